# SPDX-License-Identifier: Apache-2.0
"""Configuration: the hydra files and the typed section `embedrl`."""
