# SPDX-License-Identifier: Apache-2.0
"""The trained pair as a tool: embed a corpus, search it, fit the gate of thinking, serve vectors."""
