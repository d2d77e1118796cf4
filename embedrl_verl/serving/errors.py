# SPDX-License-Identifier: Apache-2.0
"""The error of a request that no server answered."""

from __future__ import annotations

from typing import Any

from embedrl_verl.errors import EmbedRLError


class ServerError(EmbedRLError):
    """A request failed for good: retries or time ran out, or the server refused it.

    Attributes:
        cause: a few words to count failures by, such as "timeout", "connection refused", "HTTP 503", "no server is up",
            "deadline". It names neither the server nor the request.
        status: the HTTP status if a server answered the last try, else None.
    """

    def __init__(self, message: str, cause: str, status: int | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions cross processes by pickle, which passes `args` alone
        return type(self), (str(self), self.cause, self.status)
