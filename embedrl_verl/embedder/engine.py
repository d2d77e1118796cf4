# SPDX-License-Identifier: Apache-2.0
"""verl engine `embedding_model`: an Embedder under FSDP or FSDP2, for inference and for training.

Importing this module registers it for the devices `cuda` and `cpu`. From verl's engine come the device mesh, sharding,
offload between uses, optimiser and checkpoints. Its own are the model (complete weights, no logits: `lm_head` stays for
export only) and the micro-batches: packed under a token budget, the same number on every rank because FSDP gathers
weights at every layer of every pass. A rank that has fewer runs its shortest row again and drops the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForImageTextToText
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

from embedrl_verl.embedder.batching import MicroBatch, RowBatch, budget_batches, fill, pack_rows, restore
from embedrl_verl.embedder.loading import load_generation_model
from embedrl_verl.embedder.model import embed_packed
from embedrl_verl.embedder.processor import Encoded
from embedrl_verl.errors import EmbedderError

MODEL_TYPE = "embedding_model"
ROW_FIELDS = ("input_ids", "position_ids", "multi_modal_inputs")
INFERENCE = {"compute_loss": False}
"""Batch information for `infer_batch`: vectors only, also when a loss for training is set."""


def rows_of(data: TensorDict) -> list[Encoded]:
    """The rows of a batch: jagged `input_ids` (B, L), jagged `position_ids` (B, 4, L) and `multi_modal_inputs`."""
    if missing := sorted(set(ROW_FIELDS) - set(data.keys())):
        raise EmbedderError(
            f"a row for the Embedder needs the fields {', '.join(ROW_FIELDS)}; missing: {', '.join(missing)}"
        )
    lengths = data["input_ids"].offsets().diff().tolist()
    ids = data["input_ids"].values().split(lengths)
    positions = data["position_ids"].values().split(lengths, dim=-1)
    media = data.get("multi_modal_inputs").tolist()
    return [Encoded(*parts) for parts in zip(ids, positions, media, strict=True)]


def tensordict_of(rows: list[Encoded]) -> TensorDict:
    """The batch that `rows_of` reads back: what `infer_batch` and `train_batch` of the worker take."""
    positions = [row.position_ids for row in rows]
    return tu.get_tensordict(
        {
            "input_ids": torch.nested.as_nested_tensor([row.input_ids for row in rows], layout=torch.jagged),
            "position_ids": tu.nested_tensor_from_tensor_list(positions, ragged_idx=2),
            "multi_modal_inputs": [row.multi_modal_inputs for row in rows],
        },
        INFERENCE,
    )


def deal(
    rows: list[Encoded], data: TensorDict, group: Any, *, padded: bool = False, multiple: int = 1
) -> list[MicroBatch]:
    """This rank's micro-batches within the batch's `max_token_len_per_gpu`: as many as the rank of `group` that has
    most, rounded up to `multiple`."""
    plan = budget_batches([len(row) for row in rows], int(tu.get(data, "max_token_len_per_gpu")), padded=padded)
    most = torch.tensor(len(plan), device=get_device_id())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
    return fill(plan, int(most), multiple)


def output_of(batches: list[MicroBatch], results: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """What verl takes of a rank that has embedded `count` rows; the results of its fillers are left out.

    Args:
        results: of each micro-batch: "embeddings" (b, D), and with a loss "loss" (a scalar) and "metrics".
    """
    losses: list[float] = []
    metrics: dict[str, list[Any]] = {}
    for batch, result in zip(batches, results, strict=True):
        if batch.real and "loss" in result:
            losses.append(float(result["loss"]))
            for name, value in result["metrics"].items():
                metrics.setdefault(name, []).append(value)
    embeddings = restore(batches, [result["embeddings"] for result in results], count)
    return {"model_output": {"embeddings": embeddings}, "loss": losses or [0.0], "metrics": metrics}


@contextmanager
def explained_out_of_memory(*, rows: int, tokens: int, training: bool) -> Iterator[None]:
    """Turns running out of memory on one micro-batch into an EmbedderError that names its size and the keys to lower.

    `training`: it keeps activations for gradients.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch's CPU allocator raises a plain RuntimeError
        words = ("can't allocate memory", "not enough memory")
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(one in str(error) for one in words)
        if not known:
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        key = "embedrl.embedder.train.max_tokens_per_gpu" if training else "embedrl.embedder.max_tokens_per_gpu"
        more = ", train an adapter (train.lora_rank), keep train.gradient_checkpointing on" if training else ""
        raise EmbedderError(
            f"out of memory on a micro-batch of {rows} row(s) with {tokens} tokens ({first}). Lower {key}, or "
            f"image_max_tokens and frame_max_tokens of embedrl.embedder{more}. The number of pairs does not matter: "
            "memory is that of one micro-batch"
        ) from error


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "cpu"])
class EmbeddingEngine(FSDPEngine):  # type: ignore[misc]  # verl is untyped
    """FSDP engine whose model output is {"embeddings": float32 (rows, D)}, rows in the order of the batch."""

    _all_gathered_once = False

    def _build_module(self) -> torch.nn.Module:
        self._all_gathered_once = False
        config = self.model_config.hf_config
        dtype = PrecisionType.to_dtype(self.engine_config.model_dtype)
        # Only the first rank of a shard group reads the weights, FSDP broadcasts them; tied weights are read by all.
        if config.tie_word_embeddings or self.device_mesh.get_coordinate()[-1] == 0:
            module = load_generation_model(
                self.model_config.local_path,
                config=config,
                dtype=dtype,
                attn_implementation=config._attn_implementation,
            )
        else:
            with torch.device("meta"):
                module = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if self.model_config.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner, several_ranks = module.model, torch.distributed.get_world_size() > 1

        def forward(
            input_ids: torch.Tensor, position_ids: torch.Tensor, last: torch.Tensor, media: dict[str, torch.Tensor]
        ) -> torch.Tensor:
            rows = RowBatch(input_ids, position_ids, last, media)
            return embed_packed(inner, rows, always_run_vision=several_ranks)

        module.forward = forward
        return module  # type: ignore[no-any-return]

    def _build_lora_module(self, module: Any) -> torch.nn.Module:
        """Put the adapter on. verl's own wraps for language models, whose forward takes other arguments than ours."""
        config = self.model_config
        if config.lora_adapter_path is not None:
            return PeftModel.from_pretrained(module, config.lora_adapter_path, is_trainable=True)
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            bias="none",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.engine_config.seed)
            wrapped = get_peft_model(module, adapter, autocast_adapter_dtype=False)
        # FSDP wants one dtype in a group of parameters.
        return wrapped.to(next(module.parameters()).dtype)

    def _prepare_unused_parts(self) -> None:
        """Let every part be gathered once before the first backward pass.

        In bfloat16, torch's FSDP2 (2.11) looks for the gathered weights of every part after each backward pass that
        does not reduce gradients, and fails on parts that no forward pass has used yet: `lm_head` always, and the
        vision model when the first micro-batches have no media.
        """
        if self._all_gathered_once:
            return
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.unshard()
                part.reshard()
        self._all_gathered_once = True

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """Embed the rows; with a loss, also its gradients.

        Args:
            data: as `tensordict_of`, with `max_token_len_per_gpu` (tokens of a micro-batch).
            loss_function: called with model_output={"embeddings": (b, D)}, data (the other columns of those b rows) and
                dp_group; returns (loss, metrics). Losses of micro-batches add up.

        Returns:
            {"model_output": {"embeddings": (n, D) float32 on the CPU}, "loss": list of floats, "metrics": lists}.
        """
        rows, others = rows_of(data), data.exclude(*ROW_FIELDS)
        group = self.get_data_parallel_group()
        batches = deal(rows, data, group)
        if not forward_only:
            self._prepare_unused_parts()
        results: list[dict[str, Any]] = []
        for number, batch in enumerate(batches, 1):
            packed = pack_rows([rows[i] for i in batch.rows], get_device_id())
            tokens = packed.input_ids.numel()
            last = number == len(batches)
            with (
                torch.no_grad() if forward_only else self._gradient_sync_context(is_last_micro_batch=last),
                explained_out_of_memory(rows=len(batch.rows), tokens=tokens, training=not forward_only),
            ):
                vectors = self.module(packed.input_ids, packed.position_ids, packed.last, packed.media)
                result: dict[str, Any] = {}
                if loss_function is not None:
                    part = tu.index_select_tensor_dict(others, batch.rows).to(get_device_id())
                    loss, metrics = loss_function(model_output={"embeddings": vectors}, data=part, dp_group=group)
                    if not forward_only:
                        (loss if batch.real else 0.0 * loss).backward()
                    result = {"loss": loss.detach(), "metrics": metrics}
            results.append({"embeddings": vectors.detach().float().cpu(), **result})
        return output_of(batches, results, len(rows))
