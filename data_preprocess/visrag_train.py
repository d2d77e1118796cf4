# SPDX-License-Identifier: Apache-2.0
"""VisRAG's in-domain training set as pair records: question → page. The schema: embedrl_verl/convert/sources/visrag.py.

python data_preprocess/visrag_train.py --input openbmb/VisRAG-Ret-Train-In-domain-data --out data/visrag
"""

import argparse
import sys
from typing import get_args

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.sources.visrag import Prompts, VisRagTrain


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this source."""
    parser.add_argument(
        "--prompts",
        choices=get_args(Prompts),
        default="by_source",
        help="by_source: a sentence for each kind of page (our wording); benchmark: the same for all (%(default)s)",
    )


def make(arguments: argparse.Namespace) -> VisRagTrain:
    """The converter that the options ask for."""
    return VisRagTrain(arguments.prompts)


if __name__ == "__main__":
    sys.exit(convert_main(make, __doc__.splitlines()[0], add_options))
