# SPDX-License-Identifier: Apache-2.0
"""The glue to verl: trainer mode `egrl_sync`, agent loop `tcot`, reward manager `embedder_guided`.

Importing this package imports nothing heavy; verl's processes import the module they need.
"""
