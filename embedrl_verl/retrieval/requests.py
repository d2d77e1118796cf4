# SPDX-License-Identifier: Apache-2.0
"""Bodies of /v1/embeddings: what they ask for, or why they are refused.

Texts by `input`; one input with pictures by chat `messages`, in the parts of vLLM's API, its instruction as a system
message. Pictures come in the request (data: URLs): nothing is fetched, from the network or the disk.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from embedrl_verl.data.schema import Side

FIELDS = ("input", "messages", "model", "encoding_format", "dimensions", "user", "think", "side")
SIDES: dict[str, Side] = {"query": "query", "document": "target"}
THINK = ("always", "never")


class Refusal(Exception):
    """A request that is answered with an error: `status` of HTTP, and the reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Request:
    """`inputs`: as `ask_for` takes them; `think`: None is the server's; `as_base64`: form of the vectors."""

    inputs: list[dict[str, Any]]
    side: Side
    think: Literal["always", "never"] | None
    as_base64: bool


def read_request(body: bytes, *, model: str, dim: int, max_inputs: int) -> Request:
    """The request of a body. Blocks (base64); pictures are not decoded.

    Raises:
        Refusal: 400 what the body says cannot be done; 404 another model; 413 too many inputs.
    """
    try:
        found = json.loads(body)
    except ValueError as error:  # also bytes that are not UTF-8
        raise Refusal(400, f"the body must be JSON; it is not ({error})") from error
    except RecursionError as error:
        raise Refusal(400, "the body must be JSON of few levels") from error
    if not isinstance(found, Mapping):
        raise Refusal(400, f"the body must be a JSON object; got a {type(found).__name__}")
    if unknown := sorted(set(found) - set(FIELDS)):
        raise Refusal(400, f"fields must be {', '.join(FIELDS)}; got {', '.join(map(repr, unknown))}")
    if found.get("model") not in (None, model):
        raise Refusal(404, f"model must be {model!r} or left out; got {found['model']!r}")
    if found.get("dimensions") not in (None, dim):
        raise Refusal(400, f"dimensions must be {dim} or left out; got {found['dimensions']!r}")
    form = _one_of(found, "encoding_format", ("float", "base64"), "float")
    side = SIDES[_one_of(found, "side", tuple(SIDES), "query")]
    if (found.get("input") is None) == (found.get("messages") is None):
        raise Refusal(400, "name one of input (texts) and messages (one input with pictures)")
    inputs = [_of_messages(found["messages"])] if found.get("input") is None else _texts(found["input"])
    if len(inputs) > max_inputs:
        raise Refusal(413, f"a request may have {max_inputs} inputs; got {len(inputs)}")
    think = None if found.get("think") is None else _one_of(found, "think", THINK, "")
    return Request(inputs, side, think, form == "base64")  # type: ignore[arg-type]


def _one_of(found: Mapping[str, Any], name: str, values: tuple[str, ...], default: str) -> str:
    value = default if found.get(name) is None else found[name]
    if value not in values:
        raise Refusal(400, f"{name} must be one of {', '.join(values)}; got {value!r}")
    return str(value)


def _texts(value: Any) -> list[dict[str, Any]]:
    several = [value] if isinstance(value, str) else value
    if not (isinstance(several, list) and several and all(isinstance(one, str) for one in several)):
        raise Refusal(400, "input must be a text or a list of texts that is not empty; token ids are not taken")
    return [{"text": one} for one in several]


def _of_messages(messages: Any) -> dict[str, Any]:
    if not (isinstance(messages, list) and all(isinstance(one, Mapping) for one in messages)):
        raise Refusal(400, "messages must be a list of objects")
    roles = [one.get("role") for one in messages]
    if roles not in (["user"], ["system", "user"]):
        raise Refusal(400, f"messages must be one of role user, after one of role system or none; got roles {roles}")
    instruction, _ = _content(messages[0]) if len(messages) == 2 else ("", [])
    text, images = _content(messages[-1], takes_images=True)
    return {"text": text, "images": images, "instruction": instruction}


def _content(message: Mapping[str, Any], *, takes_images: bool = False) -> tuple[str, list[bytes]]:
    parts = message.get("content")
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list):
        raise Refusal(400, "content must be a text or a list of parts")
    texts, images = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and takes_images:
            images.append(_image(part.get("image_url")))
        else:
            raise Refusal(
                400, f"a part must be a text, or in the user's message an image_url; got {json.dumps(part)[:60]}"
            )
    return "\n".join(texts), images


def _image(value: Any) -> bytes:
    url = value.get("url") if isinstance(value, Mapping) else value
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise Refusal(
            400,
            "a picture must be a data: URL, as data:image/png;base64,...; nothing is fetched from the network or the "
            f"disk; got {str(url)[:60]!r}",
        )
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise Refusal(400, f"a picture's base64 is broken ({error})") from error
