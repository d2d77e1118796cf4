# SPDX-License-Identifier: Apache-2.0
"""What a server that `embedrl serve-embedder` starts makes of a bare text, which vLLM embeds without any prompt.

    {"input": "a heron"}   ->   {"messages": [{"role": "user", "content": "a heron"}]}

vLLM renders chat requests alone by the chat template; of anything else it would pool the last word. So texts become
chat requests at /v1/embeddings, and are refused, with the way to ask, at every other address that takes texts. Chat
requests pass as they are. vLLM loads the class by `--middleware`; nothing else of this package runs in the server.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EMBEDDINGS = "/v1/embeddings"
OTHERS = frozenset(
    {"/pooling", "/v2/embed", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/classify", "/invocations"}
)
HOW = (
    f'This Embedder is asked at {EMBEDDINGS}: a text, or a list of texts, as "input"; an instruction (role "system"), '
    'images and videos as chat "messages"'
)


class PlainInput:
    """ASGI middleware: see the module."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in {EMBEDDINGS, *OTHERS}:
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            body = completed(path, body)
        except ValueError as error:
            reason = {"message": str(error), "type": "BadRequestError", "param": "input", "code": 400}
            await JSONResponse({"error": reason}, status_code=400)(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return given.pop() if given else await receive()  # vLLM waits there for the client to leave

        await self.app(scope, again, send)


def completed(path: str, body: bytes) -> bytes:
    """The body of a request with its texts as chat requests; what is no JSON object is left for vLLM to refuse.

    Raises:
        ValueError: it would be embedded without the prompt; says how to ask.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # not UTF-8, no JSON, or nested without end
        return body
    if not isinstance(request, dict):
        return body
    if path != EMBEDDINGS:
        if "messages" in request or (path == "/v2/embed" and "texts" not in request):
            return body
        raise ValueError(f"{path} would embed texts without the Embedder's prompt. {HOW}")
    if "input" not in request or _is_chat(request["input"]):
        return body
    texts = request.pop("input")
    if "messages" in request:
        raise ValueError(f'a request must have "input" or "messages"; got both. {HOW}')
    if request.get("truncate_prompt_tokens") is not None:
        raise ValueError(
            f"truncate_prompt_tokens must be left out: it would cut off the end of the prompt, where the vector is "
            f"read; got {request['truncate_prompt_tokens']!r}. Shorten the text"
        )
    if isinstance(texts, str):
        request["messages"] = _messages(texts)
    elif isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        request["messages"] = [_messages(text) for text in texts]
    else:
        raise ValueError(f"input must be a text or a list of texts; got {json.dumps(texts):.80}. {HOW}")
    return json.dumps(request).encode()


def _messages(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _is_chat(value: Any) -> bool:
    """Whether vLLM takes this `input` for one conversation or a list of them."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) or _is_chat(one) for one in value)
