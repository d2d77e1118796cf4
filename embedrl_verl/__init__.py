# SPDX-License-Identifier: Apache-2.0
"""Embedder-Guided RL for multimodal embedding models, as a plugin of verl.

This module is imported in every verl and vLLM process, so it imports nothing heavy. verl finds the plugin through the
entry point `verl.plugins` (module `embedrl_verl.platforms.plugin`) or, without an installed package, through
`VERL_USE_EXTERNAL_MODULES=embedrl_verl`: when verl is already being imported, importing this package registers the
plugin too.
"""

import sys

__version__ = "0.1.0"
__all__ = ["__version__"]

if "verl" in sys.modules:
    from embedrl_verl.platforms import plugin as _plugin  # noqa: F401  (registration is its import side effect)
