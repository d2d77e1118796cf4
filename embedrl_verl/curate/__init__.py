# SPDX-License-Identifier: Apache-2.0
"""From converted pairs to training sets: content ids, near duplicates, relevance, and the contrastive / RL split."""
