# SPDX-License-Identifier: Apache-2.0
"""The tests run on the platform `cpu`, offline and single-threaded, also on a machine with GPUs."""

import os

for _name, _value in {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(_name, _value)
