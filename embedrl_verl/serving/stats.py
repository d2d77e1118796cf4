# SPDX-License-Identifier: Apache-2.0
"""What a pool has done so far, and how its servers are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerStats:
    """One server. `requests` counts tries, also failed ones; `last_error` is "" if it never failed."""

    url: str
    up: bool
    in_flight: int
    requests: int
    last_error: str


@dataclass(frozen=True)
class PoolStats:
    """Counts since the pool was made.

    `requests`: calls of `post` and `get`. `retries`: tries after a call's first. `failures`: calls that ended in
    ServerError. `most_in_flight`: the most tries that ever ran at the same time.
    """

    requests: int
    retries: int
    failures: int
    most_in_flight: int
    servers: tuple[ServerStats, ...]

    def metrics(self) -> dict[str, float]:
        """For a log: `requests`, `retries`, `failures`, `most_in_flight`, `in_flight`, `servers_up`, `servers`, and
        `up/<i>`, `in_flight/<i>` of the i-th server (from 0)."""
        numbers = {
            "requests": self.requests,
            "retries": self.retries,
            "failures": self.failures,
            "most_in_flight": self.most_in_flight,
            "in_flight": sum(server.in_flight for server in self.servers),
            "servers_up": sum(server.up for server in self.servers),
            "servers": len(self.servers),
        }
        for i, server in enumerate(self.servers):
            numbers[f"up/{i}"] = int(server.up)
            numbers[f"in_flight/{i}"] = server.in_flight
        return {name: float(value) for name, value in numbers.items()}
