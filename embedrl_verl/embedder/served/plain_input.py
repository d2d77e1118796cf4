# SPDX-License-Identifier: Apache-2.0
"""What a server that `embedrl serve-embedder` starts makes of a bare text, which vLLM embeds without any prompt.

    {"input": "a heron"}   ->   {"messages": [{"role": "user", "content": "a heron"}]}

vLLM renders chat requests alone by the chat template; of anything else it would pool the last word, and it cuts long
prompts if asked to. So only /v1/embeddings embeds: texts become chat requests there, chat "messages" pass as they are,
and only settings that leave the prompt whole are taken. Every other POST is refused with the way to ask, save a few
that embed nothing. vLLM loads the class by `--middleware`; nothing else of this package runs in the server.
"""

from __future__ import annotations

import json
import reprlib

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

EMBEDDINGS = "/v1/embeddings"
HARMLESS = frozenset({"/tokenize", "/detokenize", "/ping"})
"""Other addresses of POST requests, which embed nothing; /health, /metrics, /v1/models and /version are GET."""
SETTINGS = frozenset(
    {"model", "user", "request_id", "priority", "cache_salt", "mm_processor_kwargs", "media_io_kwargs", "dimensions"}
    | {"encoding_format", "embed_dtype", "endianness", "use_activation"}
)
"""Not among them, as they cut or change the prompt: truncate_prompt_tokens, continue_final_message (it drops what the
template writes after the last message), chat_template and its arguments, special tokens."""
MAX_BODY = 2**30
"""Bytes. A token stands for at most 8 KiB (two patches of 32 x 32 RGB pixels in base64), so 131072 of them fit."""
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
        if scope["type"] != "http" or scope["method"] != "POST" or path in HARMLESS:
            await self.app(scope, receive, send)
            return
        if path != EMBEDDINGS:
            await _refusal(400, f"{path} could embed without the Embedder's prompt. {HOW}")(scope, receive, send)
            return
        chunks, size, more = [], 0, True
        while more and size <= MAX_BODY:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
        if size > MAX_BODY:
            text = f"a request must have at most {MAX_BODY} bytes; got more. Send fewer texts or images at once"
            await _refusal(413, text)(scope, receive, send)
            return
        try:
            body = completed(b"".join(chunks))
        except ValueError as error:
            await _refusal(400, str(error))(scope, receive, send)
            return
        del chunks  # as large as the body, and vLLM has yet to work
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return given.pop() if given else await receive()  # vLLM waits there for the client to leave

        await self.app(scope, again, send)


def completed(body: bytes) -> bytes:
    """The body of a request to /v1/embeddings with its texts as chat requests; a chat request as it is."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # not UTF-8, no JSON, or nested without end
        request = None
    if not isinstance(request, dict):
        raise ValueError(f"the body must be a JSON object. {HOW}")
    request = {name: value for name, value in request.items() if value is not None}
    for name in sorted(request.keys() - SETTINGS - {"input", "messages"}):
        raise ValueError(
            f"{name} must be left out: it would cut or change the prompt, at whose end the vector is read, or not be "
            f"heard; got {reprlib.repr(request[name])}. Shorten a text that is too long. {HOW}"
        )
    texts, messages = request.pop("input", None), request.get("messages")
    if texts is None and isinstance(messages, list) and messages:
        return body
    if messages is not None:
        raise ValueError(f"messages must be a list, not empty and with no input; got {reprlib.repr(messages)}. {HOW}")
    chats = [_chat(text) for text in texts] if isinstance(texts, list) and texts else _chat(texts)
    return json.dumps({**request, "messages": chats}).encode()


def _chat(text: object) -> list[dict[str, str]]:
    if not isinstance(text, str):
        raise ValueError(f"input must be a text or a list of texts; got {reprlib.repr(text)}. {HOW}")
    return [{"role": "user", "content": text}]


def _refusal(status: int, text: str) -> JSONResponse:
    error = {"message": text, "type": "BadRequestError", "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status)
