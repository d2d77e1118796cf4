# SPDX-License-Identifier: Apache-2.0
"""A script like those of `data_preprocess/` whose converter takes its time, so that tests can kill it half-way."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable

from embedrl_verl.convert.column_map import column_map
from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.converter import RawRow
from embedrl_verl.convert.generic import GenericConverter
from embedrl_verl.data.schema import PairRecord

COLUMNS = {
    "data_source": {"value": "own"},
    "pair_id": "id",
    "query": {"text": "question", "images": "image"},
    "target": {"text": "answer"},
}


class SlowConverter(GenericConverter):
    """Sleeps before every row."""

    def __init__(self, seconds: float) -> None:
        super().__init__(column_map(COLUMNS, "test"))
        self.seconds = seconds

    def convert(self, row: RawRow) -> Iterable[PairRecord]:
        """The row's pair, after a while."""
        time.sleep(self.seconds)
        return super().convert(row)


def slow(arguments: argparse.Namespace) -> SlowConverter:
    """From the options."""
    return SlowConverter(arguments.seconds)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The seconds that a row takes."""
    parser.add_argument("--seconds", type=float, default=0.0)


if __name__ == "__main__":
    sys.exit(convert_main(slow, "slow", add_options))
