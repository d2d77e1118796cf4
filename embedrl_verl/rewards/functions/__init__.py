# SPDX-License-Identifier: Apache-2.0
"""The ready-made reward functions, one file each: copy one, change it, name yours. `reward/` is a link to this folder.

    reward.custom_reward_function.path=reward/<name>.py                              from a checkout
    reward.custom_reward_function.path=pkg://embedrl_verl.rewards.functions.<name>   from anywhere

`docs/rewards.md` has them side by side.
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
