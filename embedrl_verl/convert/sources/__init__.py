# SPDX-License-Identifier: Apache-2.0
"""The public sources, one converter each; their facts are those of docs/data.md."""
