# SPDX-License-Identifier: Apache-2.0
"""Glue between this package and verl / vLLM: the plugin entry, the CPU platform, worker classes, and all patches of
upstream.
"""
