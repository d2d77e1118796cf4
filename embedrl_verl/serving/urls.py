# SPDX-License-Identifier: Apache-2.0
"""Addresses of servers, in one form: scheme, host, port and prefix, without /v1."""

from __future__ import annotations

from urllib.parse import urlsplit

from embedrl_verl.errors import ConfigError


def server_url(url: str) -> str:
    """Normalise an address: "host:8000", "http://host:8000/" and "http://host:8000/v1" are the same server.

    Returns:
        "http(s)://host[:port][/prefix]" without a slash at its end.

    Raises:
        ConfigError: not an http or https address of a host, or it holds a user name, a query or a fragment.
    """
    text = url.strip() if isinstance(url, str) else ""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # urlsplit reads the port when it is asked for
        valid = False
    if not valid or any(character.isspace() for character in text):
        raise ConfigError(f"a server's URL must read http://host:port (https, a path and /v1 are allowed); got {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            "a server's URL must be an address alone, without user name, query or fragment (a key is passed apart); "
            f"got one for host {parts.hostname!r}"
        )
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"
