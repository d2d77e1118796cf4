# SPDX-License-Identifier: Apache-2.0
"""The ready-made reward functions, one module each; select one with
`reward.custom_reward_function.path=pkg://embedrl_verl.rewards.functions.<name>`.

The files in reward/ name the same functions by file path. A reward function is `compute_score(batch, **reward_kwargs)`:
it gets a `RewardBatch` and returns a mapping of (N,) tensors in row order with "score" (NaN = unknown row); every other
entry is logged. `docs/rewards.md` has them side by side.
"""

# Every function and what it needs beside the similarities.
NEEDS: dict[str, str] = {
    "no_judge": "",
    "paper": "a judge",
    "public_code": "a judge",
    "outcome_only": "",
    "format_only": "",
    "soft_rank": "",
    "length_shaped": "what its base needs",
    "gain": "raw embeddings",
    "constant": "",
}
