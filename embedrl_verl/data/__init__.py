# SPDX-License-Identifier: Apache-2.0
"""Pair records, their media, and the data set and sampler that verl trains on."""
