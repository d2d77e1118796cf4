# SPDX-License-Identifier: Apache-2.0
"""$names in the YAML templates of the judge, the relevance judge and annotation; prompts of T-CoTs are jinja2."""

from __future__ import annotations

import string

from embedrl_verl.errors import ConfigError


def fill(template: str, **values: str) -> str:
    """Put values in the place of $names, once: a "$" in a value stays."""
    try:
        return string.Template(template).substitute(values)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"a template may use {', '.join('$' + name for name in values)}, and $$ for a dollar; "
            f"got {error} in {template!r}"
        ) from error
