# SPDX-License-Identifier: Apache-2.0
"""The Embedder: one message builder, prompt profiles, the processor, the forward pass and its loss.

Imported here: everything that runs in one process. verl's side (`engine`, `worker`) is imported where verl runs.
"""

from embedrl_verl.embedder.info_nce import info_nce
from embedrl_verl.embedder.messages import EmbedInput, build_messages, render_prompt
from embedrl_verl.embedder.model import Embedder
from embedrl_verl.embedder.processor import EmbedProcessor, Encoded
from embedrl_verl.embedder.profiles import EMB_TOKEN, PROFILES, EmbedderProfile, resolve_profile

__all__ = [
    "EMB_TOKEN",
    "PROFILES",
    "EmbedInput",
    "EmbedProcessor",
    "Embedder",
    "EmbedderProfile",
    "Encoded",
    "build_messages",
    "info_nce",
    "render_prompt",
    "resolve_profile",
]
