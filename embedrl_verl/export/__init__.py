# SPDX-License-Identifier: Apache-2.0
"""`embedrl export`: a checkpoint of a training run becomes a Hugging Face folder that others can load.

`folder.export_checkpoint` does all of it: `checkpoint` finds the parts, `shards`, `lora` and `weights` make complete
weights without changing a bit of them, `sentence_files` and `card` write what goes beside them.
"""
