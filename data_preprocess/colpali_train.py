# SPDX-License-Identifier: Apache-2.0
"""ViDoRe's training set as pair records, in two readings. The schema: embedrl_verl/convert/sources/colpali.py.

python data_preprocess/colpali_train.py --input vidore/colpali_train_set --preset paper_caps --out data/colpali
"""

import argparse
import sys
from typing import get_args

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.sources.colpali import Answers, ColPaliTrain, Reading


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this source."""
    parser.add_argument(
        "--reading",
        choices=get_args(Reading),
        default="answer",
        help="answer: page and question find the answer, as the reference trains; page: the question finds the page, "
        "as the benchmarks test (%(default)s)",
    )
    parser.add_argument(
        "--answers",
        choices=get_args(Answers),
        default="clean",
        help="clean: written-out lists joined, option letters resolved; raw: as in the file (%(default)s)",
    )


def make(arguments: argparse.Namespace) -> ColPaliTrain:
    """The converter that the options ask for."""
    return ColPaliTrain(arguments.reading, arguments.answers)


if __name__ == "__main__":
    sys.exit(convert_main(make, __doc__.splitlines()[0], add_options))
