# SPDX-License-Identifier: Apache-2.0
"""Bodies of /v1/embeddings: what they ask for, or why they are refused.

Texts by `input`; one input with pictures by chat `messages`, in the parts of vLLM's API, its instruction as a system
message. Pictures come in the request (data: URLs): nothing is fetched, from the network or the disk.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedrl_verl.data.schema import Side
from embedrl_verl.model.pair import Think

FIELDS = ("input", "messages", "model", "encoding_format", "dimensions", "user", "think", "side")
SIDES: dict[str, Side] = {"query": "query", "document": "target"}
THINK: tuple[Think, ...] = ("always", "never")


class Refusal(Exception):
    """A request that is answered with an error: `status` of HTTP, the reason, and the field that it is about."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


@dataclass(frozen=True)
class Request:
    """`inputs`: as `ask_for` takes them; `think`: None is the server's; `dim`: numbers of a vector; `as_base64`: form
    of the vectors."""

    inputs: list[dict[str, Any]]
    side: Side
    think: Think | None
    dim: int
    as_base64: bool


def read_request(
    body: bytes, *, model: str, dims: Sequence[int], max_inputs: int, think: Sequence[Think] = THINK
) -> Request:
    """The request of a body. Blocks (base64); pictures are not decoded.

    Args:
        dims: how many numbers of a vector can be had; the last are all.
        think: what may be asked for.

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
        raise Refusal(404, f"model must be {model!r} or left out; got {found['model']!r}", "model")
    dim = dims[-1] if found.get("dimensions") is None else found["dimensions"]
    if type(dim) is not int or dim not in dims:
        rule = f"dimensions must be {' or '.join(map(str, dims))}, which the Embedder was trained for, or left out"
        raise Refusal(400, f"{rule}; got {dim!r}", "dimensions")
    form = _one_of(found, "encoding_format", ("float", "base64"), "float")
    side = SIDES[_one_of(found, "side", tuple(SIDES), "query")]
    if (found.get("input") is None) == (found.get("messages") is None):
        raise Refusal(400, "name one of input (texts) and messages (one input with pictures)")
    inputs = [_of_messages(found["messages"])] if found.get("input") is None else _texts(found["input"])
    if len(inputs) > max_inputs:
        raise Refusal(413, f"a request may have {max_inputs} inputs; got {len(inputs)}", "input")
    how = None if found.get("think") is None else _one_of(found, "think", think, "")
    return Request(inputs, side, how, dim, form == "base64")  # type: ignore[arg-type]


def _one_of(found: Mapping[str, Any], name: str, values: Sequence[str], default: str) -> str:
    value = default if found.get(name) is None else found[name]
    if value not in values:
        raise Refusal(400, f"{name} must be one of {', '.join(values)}; got {value!r}", name)
    return str(value)


def _texts(value: Any) -> list[dict[str, Any]]:
    several = [value] if isinstance(value, str) else value
    if not (isinstance(several, list) and several and all(isinstance(one, str) for one in several)):
        rule = "input must be a text or a list of texts that is not empty; token ids are not taken"
        raise Refusal(400, rule, "input")
    return [{"text": one} for one in several]


def _of_messages(messages: Any) -> dict[str, Any]:
    if not (isinstance(messages, list) and all(isinstance(one, Mapping) for one in messages)):
        raise Refusal(400, "messages must be a list of objects", "messages")
    roles = [one.get("role") for one in messages]
    if roles not in (["user"], ["system", "user"]):
        rule = "messages must be one of role user, after one of role system or none"
        raise Refusal(400, f"{rule}; got roles {roles}", "messages")
    instruction, _ = _content(messages[0], "messages[0].content") if len(messages) == 2 else ("", [])
    text, images = _content(messages[-1], f"messages[{len(messages) - 1}].content", takes_images=True)
    return {"text": text, "images": images, "instruction": instruction}


def _content(message: Mapping[str, Any], field: str, *, takes_images: bool = False) -> tuple[str, list[bytes]]:
    parts = message.get("content")
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list):
        raise Refusal(400, f"{field}: content must be a text or a list of parts", field)
    texts, images = [], []
    for number, part in enumerate(parts):
        where = f"{field}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and takes_images:
            images.append(_image(part.get("image_url"), f"{where}.image_url"))
        else:
            rule = f"{where}: a part must be a text, or in the user's message an image_url"
            raise Refusal(400, f"{rule}; got {json.dumps(part)[:60]}", where)
    return "\n".join(texts), images


def _image(value: Any, field: str) -> bytes:
    url = value.get("url") if isinstance(value, Mapping) else value
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise Refusal(
            400,
            f"{field}: a picture must be a data: URL, as data:image/png;base64,...; nothing is fetched from the "
            f"network or the disk; got {str(url)[:60]!r}",
            field,
        )
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise Refusal(400, f"{field}: a picture's base64 is broken ({error})", field) from error
