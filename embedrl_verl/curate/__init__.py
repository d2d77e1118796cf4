# SPDX-License-Identifier: Apache-2.0
"""From converted pairs to training sets: content ids, near duplicates, and the contrastive / RL split."""
