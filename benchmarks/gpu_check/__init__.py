# SPDX-License-Identifier: Apache-2.0
"""The stages of scripts/gpu_check.sh: what the project assumes of a GPU, measured on one."""
