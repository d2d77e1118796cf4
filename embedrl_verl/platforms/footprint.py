# SPDX-License-Identifier: Apache-2.0
"""Bytes that a model takes on one device, from its configuration alone: weights, gradients, optimizer, activations.

The parameters are counted on a model without storage, so they are exact for the Qwen-VL families. The activations are
two factors a token, fitted to what torch's memory tracker counts in the passes of the four default models at full width
(`tests/platforms/test_footprint.py` holds them there, and at a tiny float32 model on one rank of verl's own engine).
Only computed: what several ranks gather and reduce, and Megatron's numbers. In none of them: what the caching allocator
cannot use (fragments).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BF16, FP32 = 2, 4
ADAM = 2 * FP32
LOGIT_BYTES = 6
"""A logit of the whole matrix, bfloat16: itself, its log-softmax, its gradient."""
LOGIT_FORWARD_BYTES, LOGIT_ENTROPY_BYTES = 2, 10
"""The same without gradients, and with verl's entropy beside."""
FUSED_CHUNK = 512
FUSED_COPIES = 6
"""float32 matrices of FUSED_CHUNK x vocabulary that verl's fused cross-entropy holds in its backward pass."""

_7B = {
    **{"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    **{"intermediate_size": 18944, "vocab_size": 152064},
}
_8B = {
    **{"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936},
}
_2B = {**_8B, "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144}
_VISION_2 = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16}
_VISION_2_5 = {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16}
_VISION_3 = {
    **{"depth": 27, "hidden_size": 1152, "out_hidden_size": 4096, "intermediate_size": 4304, "num_heads": 16},
    "deepstack_visual_indexes": [8, 16, 24],
}
_VISION_3_2B = {
    **{"depth": 24, "hidden_size": 1024, "out_hidden_size": 2048, "intermediate_size": 4096, "num_heads": 16},
    "deepstack_visual_indexes": [5, 11, 17],
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    name: (family, {"text_config": text, "vision_config": vision, "tie_word_embeddings": text is _2B})
    for name, family, text, vision in (
        ("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", _7B, _VISION_2),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", _7B, _VISION_2_5),
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", _8B, _VISION_3),
        ("Qwen/Qwen3-VL-Embedding-2B", "qwen3_vl", _2B, _VISION_3_2B),
    )
}
"""Model type and configuration of the recipes' default models, for plans on machines that do not have them."""


@dataclass(frozen=True)
class Shape:
    """What the bytes of a model depend on."""

    parameters: int  # of the whole model; a tied output matrix counts once
    experts: int  # those of them in experts
    layers: int  # of the decoder
    layer: int  # parameters of the largest of them
    root: int  # parameters outside of layers: embedding, output matrix, merger
    hidden: int
    ffn: int  # width, of one token's experts together
    vocab: int
    key_values: int  # numbers that one token keeps in one layer of a KV cache
    vision_layers: int
    vision_hidden: int
    vision_ffn: int
    vision_gated: bool  # its MLPs have a gate
    patch: int  # numbers of one patch in `pixel_values`
    patches: int  # that are merged into one visual token

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a Qwen-VL configuration of transformers. Raises what transformers raises of one that is none."""
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
        inner = model.model
        decoder, blocks = inner.language_model.layers, inner.visual.blocks
        count = [sum(one.numel() for one in layer.parameters()) for layer in decoder]
        in_blocks = sum(one.numel() for one in blocks.parameters())
        sizes = {name: one.numel() for name, one in model.named_parameters()}
        parameters = sum(sizes.values())
        text, vision = config.get_text_config(), config.vision_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        experts = getattr(text, "num_experts_per_tok", None)
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        return cls(
            parameters=parameters,
            experts=sum(size for name, size in sizes.items() if ".experts." in name),
            layers=len(decoder),
            layer=max(count),
            root=parameters - sum(count) - in_blocks,
            hidden=text.hidden_size,
            ffn=experts * text.moe_intermediate_size if experts else text.intermediate_size,
            vocab=text.vocab_size,
            key_values=2 * text.num_key_value_heads * head_dim,
            vision_layers=len(blocks),
            vision_hidden=width,
            vision_ffn=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
            vision_gated=hasattr(blocks[0].mlp, "gate_proj"),
            patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            patches=vision.spatial_merge_size**2,
        )

    def layer_backward(self, tokens: int) -> int:
        """A decoder layer that is computed anew and differentiated, bfloat16, without what it was given."""
        return BF16 * tokens * (7 * self.ffn + 12 * self.hidden)

    def layer_forward(self, tokens: int) -> int:
        """A decoder layer without gradients, bfloat16."""
        return BF16 * tokens * (3 * self.ffn + 4 * self.hidden)

    def vision_backward(self, visual: int) -> int:
        """The vision model's pass as `layer_backward`, for `visual` tokens of the prompt."""
        ffn = (8 if self.vision_gated else 4) * self.vision_ffn
        return BF16 * visual * self.patches * (ffn + 12 * self.vision_hidden)

    def vision_forward(self, visual: int) -> int:
        """The vision model's pass as `layer_forward`."""
        return BF16 * visual * self.patches * (3 * self.vision_ffn + 6 * self.vision_hidden)

    def checkpoints(self, tokens: int, visual: int) -> int:
        """Inputs of all layers, which gradient checkpointing keeps, bfloat16."""
        kept = self.layers * tokens * self.hidden + self.vision_layers * visual * self.patches * self.vision_hidden
        return BF16 * kept

    def pixels(self, visual: int) -> int:
        """`pixel_values` of `visual` tokens, float32."""
        return FP32 * visual * self.patches * self.patch

    def loss(self, tokens: int, *, fused: bool) -> int:
        """Log-probs of all tokens with their gradient."""
        if fused:
            return FUSED_COPIES * FP32 * min(tokens, FUSED_CHUNK) * self.vocab
        return LOGIT_BYTES * tokens * self.vocab

    def cached(self, tokens: int) -> int:
        """KV cache of `tokens`, bfloat16."""
        return BF16 * tokens * self.layers * self.key_values


@cache
def shape_of(path: str) -> Shape | None:
    """Of a local folder, a model in the hub's local cache or a published default; None where nothing tells.

    Never asks the network, and runs no code of the folder.
    """
    from transformers import AutoConfig

    try:
        return Shape.of(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    except Exception as problem:  # whatever a foreign configuration makes transformers raise: it is an estimate
        logger.debug("no shape of %s: %s", path, problem)
    if path not in PUBLISHED or Path(path).exists():
        return None
    model_type, values = PUBLISHED[path]
    return Shape.of(AutoConfig.for_model(model_type, **values))


@dataclass(frozen=True)
class Fsdp:
    """A model on verl's FSDP engine, on one rank."""

    shape: Shape
    shards: int  # ranks that share the weights
    trained: int  # parameters with a gradient; 0 = frozen
    master: int = FP32  # bytes of a weight as it rests (4: trained in float32)
    compute: int = BF16  # bytes of a weight in a layer at work

    @property
    def weights(self) -> int:
        """Its shard."""
        return self.master * self.shape.parameters // self.shards

    @property
    def optimizer(self) -> int:
        """Moments of Adam of its shard."""
        return ADAM * self.trained // self.shards

    @property
    def gathered(self) -> int:
        """A layer at work and the next one, and what stays whole during a pass."""
        return 0 if self._in_place else self.compute * (2 * self.shape.layer + self.shape.root)

    @property
    def _in_place(self) -> bool:
        """Weights are used where they rest: on one rank, without a change of type."""
        return self.shards == 1 and self.compute == self.master

    def forward(self, tokens: int, visual: int, *, logit_bytes: int = 0) -> int:
        """A pass without gradients, over what rests; `logit_bytes` of each of tokens x vocabulary."""
        shape = self.shape
        work = max(shape.layer_forward(tokens), shape.vision_forward(visual), logit_bytes * tokens * shape.vocab)
        return self.gathered + work * self.compute // BF16 + shape.pixels(visual)

    def update(self, tokens: int, visual: int, *, fused: bool, checkpointing: bool, loss: bool = True) -> int:
        """Gradients and the largest moment of the passes, over what rests; `loss` False: no output matrix at work."""
        shape = self.shape
        backward, vision = shape.layer_backward(tokens), shape.vision_backward(visual)
        if checkpointing:
            work = shape.checkpoints(tokens, visual) + max(backward, vision)
        else:
            work = shape.layers * backward + shape.vision_layers * vision
        work += shape.loss(tokens, fused=fused) if loss else 0
        gradients = FP32 * self.trained // self.shards
        # An adapter's gradients are small; without one whole layers are reduced.
        whole = 0 if self._in_place or self.trained < shape.parameters else max(shape.layer, shape.root)
        reducing = (self.compute + FP32) * whole
        return gradients + reducing + self.gathered + work * self.compute // BF16 + shape.pixels(visual)


@dataclass(frozen=True)
class Megatron:
    """A model on verl's Megatron engine, on one rank: all activations recomputed, distributed optimizer."""

    shape: Shape
    tensor: int  # size of the split, as the next
    pipeline: int
    ranks: int
    trained: bool  # it has gradients and an optimizer
    expert: int = 1  # size of the split of the experts alone
    logits: bool = True  # it has an output matrix at work (an Embedder has none)

    @property
    def weights(self) -> int:
        """Its share in bfloat16."""
        return BF16 * (self._dense + self._experts)

    @property
    def gradients(self) -> int:
        """Those of its share in float32, which data-parallel ranks do not divide."""
        return FP32 * (self._dense + self._experts) if self.trained else 0

    @property
    def optimizer(self) -> int:
        """float32 weights and the moments of Adam, shared by all ranks that hold the same weights."""
        copies = self.ranks // (self.tensor * self.pipeline)
        expert_copies = max(copies // self.expert, 1)
        whole = (FP32 + ADAM) * (self._dense / copies + self._experts / expert_copies)
        return int(whole) if self.trained else 0

    @property
    def _dense(self) -> int:
        return (self.shape.parameters - self.shape.experts) // (self.tensor * self.pipeline)

    @property
    def _experts(self) -> int:
        return self.shape.experts // (self.tensor * self.pipeline * self.expert)

    def _logits(self, tokens: int) -> int:
        return 2 * FP32 * tokens * self.shape.vocab // self.tensor if self.logits else 0

    def update(self, tokens: int, visual: int) -> int:
        """Gradients, and the first stage's pass with a micro-batch in flight for each stage or the last one's with the
        logits."""
        shape = self.shape
        kept = shape.checkpoints(tokens, 0) // self.tensor  # layers of one stage, for each micro-batch in flight
        vision = shape.checkpoints(0, visual) + shape.vision_backward(visual)
        layer = shape.layer_backward(tokens) // self.tensor
        first = kept + max(layer, vision)
        last = kept // self.pipeline + max(layer, self._logits(tokens))
        return self.gradients + max(first, last) + shape.pixels(visual)

    def forward(self, tokens: int, visual: int) -> int:
        """A pass without gradients."""
        shape = self.shape
        work = max(shape.layer_forward(tokens) // self.tensor, shape.vision_forward(visual), self._logits(tokens))
        return work + shape.pixels(visual)
