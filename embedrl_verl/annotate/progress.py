# SPDX-License-Identifier: Apache-2.0
"""How a run over an input goes, what it has counted, and when so much has failed that it stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedrl_verl.errors import DataError


@dataclass(frozen=True)
class RunnerSettings:
    """How a run goes; nothing here changes an answer.

    Attributes:
        limit: errands asked about at the same time.
        threads: for decoding and encoding media.
        media_bytes: of encoded media in memory: above it no more are decoded (what is being decoded, one request a
            thread, comes on top).
        max_failed_share, max_rejected_share: of errands that end without a result, of rows that cannot be used. Above
            it the run stops; looked at after `first_check` of them.
    """

    limit: int
    threads: int
    media_bytes: int = 2 << 30
    max_failed_share: float = 0.1
    max_rejected_share: float = 0.01
    first_check: int = 200


class TooManyBad(DataError):
    """A share is above its limit; answers so far are kept."""


@dataclass
class Progress:
    """Counts over all chunks, those of earlier runs among them.

    `failed` and `rejected` count by cause.
    """

    errands: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    replies: int = 0
    completion_tokens: int = 0

    def add(self, summary: Mapping[str, Any]) -> None:
        """Take in the summary of a complete journal."""
        self.errands += summary.get("errands", 0)
        self.rows += summary.get("rows", 0)
        self.failed.update(summary.get("failed", {}))
        self.rejected.update(summary.get("rejected", {}))

    def check(self, settings: RunnerSettings, *, final: bool) -> None:
        """Raise TooManyBad above a limit."""
        for what, bad, total, allowed, option in (
            ("errands", self.failed, self.errands, settings.max_failed_share, "--max-failed-share"),
            ("rows", self.rejected, self.rows, settings.max_rejected_share, "--max-bad-share"),
        ):
            if bad.total() > allowed * total and (final or total >= settings.first_check):
                causes = "; ".join(f"{count} x {cause}" for cause, count in bad.most_common(5))
                raise TooManyBad(
                    f"{bad.total()} of {total} {what} cannot be used, above {option} {allowed:g}. Causes: {causes}. "
                    f"Answers so far are kept: mend the cause, or raise {option}, and run the command again"
                )
