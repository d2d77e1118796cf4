# SPDX-License-Identifier: Apache-2.0
"""Sampling settings that are sent by name, so that a served model samples as one in process does."""

NEUTRAL_SAMPLING = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""vLLM's own defaults in process. `vllm serve` takes what a request leaves out from the checkpoint's
generation_config.json (a repetition penalty of 1.05 and the 20 likeliest tokens, for one). Other servers may refuse the
first three."""
