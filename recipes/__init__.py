# SPDX-License-Identifier: Apache-2.0
"""A package, so that `recipes.tiny_digits` is this one, whatever other packages are installed."""
