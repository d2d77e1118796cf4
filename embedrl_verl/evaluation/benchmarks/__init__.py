# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks: their tasks as tables, readers of their data, one runner and the published averages."""
