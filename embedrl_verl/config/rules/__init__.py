# SPDX-License-Identifier: Apache-2.0
"""Every rule about the settings of a run, once: `plan`, `train` and the trainer itself ask here.

Types and ranges of our own sections are in `config.schema`. Each rule is (whether it holds, the message if not).
"""

from embedrl_verl.config.rules.inputs import (
    check_family,
    check_files,
    check_resumed_step,
    files_of,
    last_step,
    missing_files,
    refuse_videos_that_megatron_misplaces,
)
from embedrl_verl.config.rules.run import COLOCATE, check_run_config, has_judge

__all__ = [
    "COLOCATE",
    "check_family",
    "check_files",
    "check_resumed_step",
    "check_run_config",
    "files_of",
    "has_judge",
    "last_step",
    "missing_files",
    "refuse_videos_that_megatron_misplaces",
]
