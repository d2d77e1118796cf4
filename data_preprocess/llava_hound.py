# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Hound as pair records: videos, in three modes. The schema: embedrl_verl/convert/sources/llava_hound.py.

python data_preprocess/llava_hound.py --input train_video_and_instruction --preset paper_caps --out data/llavahound
"""

import argparse
import sys
from pathlib import Path

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.sources.llava_hound import FRAMES, MODES, QUESTION_LINES, LlavaHound
from embedrl_verl.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this source."""
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="data sources (all)")
    parser.add_argument(
        "--frames-dir", default="train_300k", help="folder of the videos, relative to the media root (%(default)s)"
    )
    parser.add_argument(
        "--frames", type=int, default=FRAMES, help="frames named of a folder, evenly spaced; 0 for all (%(default)s)"
    )
    parser.add_argument(
        "--question-lines", type=int, default=QUESTION_LINES, help="lines of the second file that are QA (%(default)s)"
    )
    parser.add_argument("--embed-rl", action="store_true", help="the input is Embed-RL's copies, one object a line")


def make(arguments: argparse.Namespace) -> LlavaHound:
    """The converter that the options ask for.

    Raises:
        ConfigError: the input is not a local folder, and no media root says where the videos are.
    """
    root = Path(arguments.media_root or arguments.input).expanduser()
    if not root.is_dir():
        raise ConfigError(f"the videos must be in a local folder; name it with --media-root (got {root})")
    return LlavaHound(
        media_root=str(root),
        modes=tuple(arguments.modes),
        frames_dir=arguments.frames_dir,
        frames=arguments.frames,
        question_lines=arguments.question_lines,
        embed_rl=arguments.embed_rl,
    )


if __name__ == "__main__":
    sys.exit(convert_main(make, __doc__.splitlines()[0], add_options))
