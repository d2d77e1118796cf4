# SPDX-License-Identifier: Apache-2.0
"""The environment of engines on a machine without a GPU, as recipes/common.sh exports it: for what starts them from
Python (tests, benchmarks). A file of its own, because it is needed before torch is imported."""

CPU_ENV = {
    "VERL_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles two small functions of its sampler: 20 s a start
}
