# SPDX-License-Identifier: Apache-2.0
"""Retrieval metrics and their uncertainty."""
