# SPDX-License-Identifier: Apache-2.0
"""Numbers drawn from a pair's id: the same in every run, whatever was asked before or beside it."""

from __future__ import annotations

import hashlib

ALMOST_GREEDY = 0.01
"""Temperature at which vLLM samples with a seed and comes to what greedy decoding gives (it raises lower ones to this).
Its CPU sampler heeds seeds only while every request of a batch is sampled with one, so a greedy request would make the
draws of those beside it depend on chance."""


def seed_of(seed: int, *key: object) -> int:
    """A seed in [0, 2^31) for one request."""
    return _number(seed, *key) >> 33


def temperature_of(number: int, first: float, later: float) -> float:
    """Temperature of a try (from 0) where refused replies are drawn again: `first`, then `later` if that is higher."""
    return max(ALMOST_GREEDY, first, later if number else 0.0)


def is_in_share(share: float, seed: int, *key: object) -> bool:
    """Whether a key belongs to a random share of all keys. Raising the share only adds keys."""
    return _number(seed, *key) < share * 2.0**64


def _number(*key: object) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.sha256(repr(key).encode(errors="surrogatepass")).digest()[:8], "big")
