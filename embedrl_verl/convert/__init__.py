# SPDX-License-Identifier: Apache-2.0
"""From rows of a public or own data set to parquet files of pair records. Imports neither torch, verl nor ray."""
