# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker extension for engines outside verl: `vllm.LLM(worker_extension_cls=...)`."""

from __future__ import annotations

import logging
from typing import Any

from embedrl_verl.platforms.patches import rewind_cpu_generators


class SeedsOnCpus:
    """A worker that does not die of a request with a seed on a CPU; nothing is changed on other devices."""

    def __new__(cls, **kwargs: Any) -> SeedsOnCpus:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            rewind_cpu_generators()
            logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)  # a line a request, if not apart
        return super().__new__(cls)
