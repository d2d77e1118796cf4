# SPDX-License-Identifier: Apache-2.0
"""verl engine `embedding_model` on the backend `megatron`: an Embedder under Megatron-Core, counterpart of `engine.py`.

Importing this module registers it for the device `cuda`; without Megatron-Core the import raises ConfigError. From
verl's engine come the process groups, Megatron-Bridge's model and weights, DDP, optimiser, offload and checkpoints.
Four places of the bridge's model are changed, before Megatron wraps it, and its parameters keep their names:

- **Positions.** Bridge's models compute M-RoPE positions themselves and drop those of the caller. Ours go in where the
  angles are made: a pre-hook of `rotary_pos_emb` on every pipeline stage.
- **Output.** `output_layer.forward` on the last stage pools: the state after the final norm at each row's last token,
  summed over tensor ranks when the sequence is split. There are no logits.
- **Output matrix.** It has no gradient, so it is frozen (weight decay would shrink it) and stays for export; one that
  is tied to the input embedding trains as such.
- **Hand-over.** Qwen2.5-VL's states keep the strides of a transposed (B, S) batch, which cannot be sent to the next
  pipeline stage; each stage's output is made contiguous.

Rows are padded on the right in (B, S) batches: attention is causal, so no mask is needed. Under sequence parallelism a
rank holds a slice of the sequence, so S divides by the R tensor ranks. Vectors exist on the last pipeline stage, of
which verl collects the first tensor rank; elsewhere the result is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine import EngineRegistry

from embedrl_verl.embedder.batching import MicroBatch, RowBatch, pad_rows, pool_last, unit
from embedrl_verl.embedder.engine import MODEL_TYPE, ROW_FIELDS, deal, output_of, rows_of
from embedrl_verl.errors import ConfigError, EmbedderError

try:
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
    from verl.utils.megatron.pipeline_parallel import make_batch_generator
    from verl.workers.engine.megatron.transformer_impl import MegatronEngine
except ImportError as error:
    raise ConfigError(
        f"the Embedder's strategy megatron needs megatron-core and megatron-bridge, which cannot be imported: {error}. "
        "Use verl's image, or choose fsdp2"
    ) from error


def _contiguous(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.contiguous()


@EngineRegistry.register(model_type=MODEL_TYPE, backend="megatron", device="cuda")
class MegatronEmbeddingEngine(MegatronEngine):  # type: ignore[misc]  # verl is untyped
    """Megatron engine whose model output is {"embeddings": float32 (rows, D)}, rows in the order of the batch."""

    _rows: RowBatch | None = None
    """Of the micro-batch that runs."""

    def _build_tf_config(self) -> None:
        super()._build_tf_config()
        # For Qwen2.5-VL the bridge takes the sections of the released sizes, whatever config.json says.
        rope = self.model_config.hf_config.get_text_config().rope_parameters
        if "mrope_section" in rope:
            self.provider.mrope_section = list(rope["mrope_section"])
        self.provider.register_pre_wrap_hook(self._adapt)

    def _adapt(self, chunks: list[Any]) -> list[Any]:
        """Apply the changes of the module docstring to this rank's model chunks, not yet wrapped."""
        for chunk in chunks:
            language = chunk.language_model
            language.rotary_pos_emb.register_forward_pre_hook(self._own_positions)
            chunk.register_forward_hook(_contiguous)
            if not language.post_process:
                continue
            language.output_layer.forward = partial(self._pool, language.config.sequence_parallel)
            if not language.share_embeddings_and_output_weights:
                language.output_layer.requires_grad_(False)
        return chunks

    def _own_positions(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of the rotary embedding with the batch's M-RoPE positions (3, B, S) in the first place."""
        theirs, *others = inputs
        ours = self._current().position_ids
        if theirs.shape != ours.shape:
            raise EmbedderError(
                f"positions must be (axes, rows, tokens) {tuple(ours.shape)}; the model's are {tuple(theirs.shape)}. "
                "This version of Megatron-Bridge lays rows out in another way; use the one in docs/gpu.md"
            )
        return ours, *others

    def _pool(
        self,
        sequence_parallel: bool,
        hidden: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        """In place of logits: (1, B, D) from (S / R, B, D), the same on all R tensor ranks."""
        del weight, runtime_gather_output
        first = mpu.get_tensor_model_parallel_rank() * len(hidden) if sequence_parallel else 0
        pooled = pool_last(hidden, self._current().last, first)
        if sequence_parallel:
            # Backward hands every rank the gradient of its own tokens: the loss is computed alike on all of them.
            pooled = reduce_from_tensor_model_parallel_region(pooled)
        return pooled[None], None

    def _current(self) -> RowBatch:
        if self._rows is None:
            raise EmbedderError("the Embedder's model runs through forward_backward_batch only; call infer_batch")
        return self._rows

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """As `EmbeddingEngine.forward_backward_batch`, `max_token_len_per_gpu` being rows x longest row.

        The loss function is called on the last pipeline stage; on the others the result is {}.
        """
        rows, others = rows_of(data), data.exclude(*ROW_FIELDS)
        group = self.get_data_parallel_group()
        interleaved = (mpu.get_virtual_pipeline_model_parallel_world_size() or 1) > 1
        multiple = self.tf_config.microbatch_group_size_per_vp_stage if interleaved else 1
        batches = deal(rows, data, group, padded=True, multiple=multiple)

        def forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            """One stage's pass over a micro-batch, and what the last stage does with its output."""
            batch = next(iterator)
            tensor_ranks = mpu.get_tensor_model_parallel_world_size()
            self._rows = padded = pad_rows([rows[i] for i in batch.rows], get_device_id(), tensor_ranks)
            media = {
                name: value.to(self.param_dtype) if value.is_floating_point() else value
                for name, value in padded.media.items()
            }
            output = model(input_ids=padded.input_ids, position_ids=None, attention_mask=None, **media)
            return output, partial(loss_of, batch)

        def loss_of(batch: MicroBatch, pooled: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            """Loss of a micro-batch from (B, 1, D), times their number, by which Megatron divides."""
            vectors = unit(pooled[:, 0])
            result: dict[str, Any] = {"embeddings": vectors.detach()}
            loss = vectors.new_zeros(())
            if loss_function is not None:
                part = tu.index_select_tensor_dict(others, batch.rows).to(get_device_id())
                loss, metrics = loss_function(model_output={"embeddings": vectors}, data=part, dp_group=group)
                result |= {"loss": loss.detach(), "metrics": metrics}
            return (loss if batch.real else 0.0 * loss) * len(batches), result

        try:
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=make_batch_generator(batches, vpp_size=len(self.module)),
                model=self.module,
                num_microbatches=len(batches),
                seq_length=1,  # stages tell each other the shapes
                micro_batch_size=1,
                forward_only=forward_only,
            )
        finally:
            self._rows = None
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return {}
        return output_of(batches, results, len(rows))
