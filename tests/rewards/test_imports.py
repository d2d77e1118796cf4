# SPDX-License-Identifier: Apache-2.0
"""The maths can be used from a REPL: it brings no trainer, no Ray and no model library."""

import subprocess
import sys


def test_rewards_and_metrics_import_no_trainer_and_no_model_library():
    code = (
        "import sys, embedrl_verl.rewards, embedrl_verl.rewards.functions.paper, embedrl_verl.evaluation.metrics\n"
        "import embedrl_verl.cli, embedrl_verl.rewards.dump, embedrl_verl.rewards.trial\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'verl', 'ray', 'transformers', 'vllm'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
