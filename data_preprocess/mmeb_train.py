# SPDX-License-Identifier: Apache-2.0
"""MMEB-train as pair records: 20 image sets. The schema and its traps: embedrl_verl/convert/sources/mmeb.py.

python data_preprocess/mmeb_train.py --input MMEB-train --media-root MMEB-train --preset paper_caps --out data/mmeb
"""

import argparse
import sys

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.instructions import MMEB_TASKS
from embedrl_verl.convert.sources.mmeb import SPLITS, MmebTrain


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this source."""
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET", help=f"all by default: {', '.join(MMEB_TASKS)}")
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="wording of the instructions (%(default)s)")
    parser.add_argument("--images-dir", default="", help="folder of images/, relative to the media root (the root)")
    parser.add_argument("--negatives", action="store_true", help="keep the hard negatives that some sets have")


def make(arguments: argparse.Namespace) -> MmebTrain:
    """The converter that the options ask for."""
    return MmebTrain(tuple(arguments.sets), arguments.split, arguments.negatives, arguments.images_dir)


if __name__ == "__main__":
    sys.exit(convert_main(make, __doc__.splitlines()[0], add_options))
