# SPDX-License-Identifier: Apache-2.0
"""The Embedder's engine on real Megatron-Core, where that is installed.

CPU processes over gloo, a language model of Megatron's own layers (no Transformer Engine, no Megatron-Bridge) inside a
stand-in for the bridge's multimodal model: like that one it computes positions of its own, wrong ones here, and drops
the caller's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from embedrl_verl.embedder import Encoded
from embedrl_verl.embedder.batching import RowBatch, fill
from embedrl_verl.errors import ConfigError
from embedrl_verl.platforms.ports import free_port

HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
needs_megatron = pytest.mark.skipif(not HAS_MEGATRON, reason="megatron-core is not installed")
HIDDEN, VOCABULARY, SECTIONS = 64, 96, [4, 6, 6]


@pytest.mark.skipif(HAS_MEGATRON, reason="megatron-core is installed")
def test_without_megatron_the_import_says_what_to_install():
    with pytest.raises(ConfigError, match="needs megatron-core and megatron-bridge.*or choose fsdp2"):
        import embedrl_verl.embedder.megatron_engine  # noqa: F401


@needs_megatron
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_gives_vectors_and_gradients_of_rows_run_alone_also_with_a_split_sequence(ranks, tmp_path):
    port = free_port()
    command = [sys.executable, __file__, str(ranks), str(port), str(tmp_path)]
    started = [subprocess.Popen([*command, str(rank)]) for rank in range(ranks)]
    assert [process.wait(timeout=300) for process in started] == [0] * ranks
    for rank in range(ranks):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert len(result["losses"]) == 3 and result["fillers"] == 1 and result["frozen"] == ["output_layer.weight"]
        assert (result["vectors"] - result["alone"]).abs().max() < 1e-5
        assert (result["other_positions"] - result["alone"]).abs().max() > 1e-2  # so the check above is not vacuous
        assert sum(result["losses"]) == pytest.approx(result["alone_loss"], abs=1e-4)
        assert set(result["gradients"]) == set(result["alone_gradients"]) and len(result["gradients"]) > 10
        for name, gradient in result["alone_gradients"].items():
            assert (result["gradients"][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


def _tensor_rank(ranks: int, port: int, folder: Path, rank: int) -> None:
    """One tensor-parallel rank: the engine's batches, then every row alone with the right positions."""
    os.environ["VERL_PLATFORM"] = "cpu"
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    _megatron_on_cpu()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from verl.utils import tensordict_utils as tu

    from embedrl_verl.embedder import engine as engines
    from embedrl_verl.embedder.engine import tensordict_of
    from embedrl_verl.embedder.megatron_engine import MegatronEmbeddingEngine

    mpu.initialize_model_parallel(tensor_model_parallel_size=ranks)
    chunk = _chunk(ranks)
    engine = MegatronEmbeddingEngine.__new__(MegatronEmbeddingEngine)
    engine._rows, engine.module, engine.param_dtype = None, engine._adapt([chunk]), torch.float32
    engine.engine_config, engine.tf_config = SimpleNamespace(dynamic_context_parallel=False), chunk.config
    engines.fill = lambda plan, most, multiple: fill(plan, most + 1, multiple)  # one filler

    generator = torch.Generator().manual_seed(1)
    rows = [_row(length, generator) for length in (6, 14, 10, 2, 8, 12)]  # even: a row alone is split over 2 ranks
    weights = torch.randn(len(rows), HIDDEN, generator=generator)
    data = tensordict_of(rows)
    data["weight"] = weights
    tu.assign_non_tensor(data, max_token_len_per_gpu=30)
    seen: list[bool] = []

    def loss(model_output: dict[str, Any], data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append(True)
        return (model_output["embeddings"] * data["weight"].float()).sum(), {"rows": len(data)}

    output = engine.forward_backward_batch(data, loss)
    result = {
        "vectors": output["model_output"]["embeddings"],
        "losses": output["loss"],
        "fillers": len(seen) - len(output["loss"]),
        "gradients": _gradients(chunk),
        "frozen": [name for name, weight in chunk.language_model.named_parameters() if not weight.requires_grad],
    }

    # Alone: no padding, no pooling; states after the final norm, gathered.
    chunk.zero_grad(set_to_none=True)
    states: list[torch.Tensor] = []
    chunk.language_model.decoder.final_layernorm.register_forward_hook(lambda _, __, out: states.append(out))

    def alone(row: Encoded, positions: torch.Tensor) -> torch.Tensor:
        engine._rows = RowBatch(row.input_ids[None], positions[1:, None], torch.tensor([len(row) - 1]), {})
        chunk(input_ids=row.input_ids[None], position_ids=None, attention_mask=None)
        hidden = states.pop()
        whole = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False) if ranks > 1 else hidden
        return functional.normalize(whole[-1, 0], dim=0)

    vectors = torch.stack([alone(row, row.position_ids) for row in rows])
    alone_loss = (vectors * weights).sum()
    alone_loss.backward()
    text = [torch.arange(len(row)).expand(4, -1) for row in rows]
    with torch.no_grad():
        other = torch.stack([alone(row, positions) for row, positions in zip(rows, text, strict=True)])
    result |= {"alone": vectors.detach(), "other_positions": other, "alone_loss": alone_loss.item()}
    torch.save(result | {"alone_gradients": _gradients(chunk)}, folder / f"{rank}.pt")
    torch.distributed.barrier()


def _row(length: int, generator: torch.Generator) -> Encoded:
    """Text around a made-up medium whose axes differ."""
    positions = torch.arange(length).repeat(4, 1)
    positions[2:, 1:] += torch.randint(0, 5, (2, length - 1), generator=generator)
    return Encoded(torch.randint(0, VOCABULARY, (length,), generator=generator), positions)


def _gradients(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """This rank's gradients; those of norms summed over the slices of the sequence, as Megatron does after a pass."""
    result = {}
    for name, weight in chunk.named_parameters():
        if weight.grad is not None:
            result[name] = weight.grad.clone()
            if getattr(weight, "sequence_parallel", False):
                torch.distributed.all_reduce(result[name])
    return result


def _chunk(ranks: int) -> torch.nn.Module:
    """Two language layers with M-RoPE in a stand-in for the bridge's model, float32."""
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig, transformer_block

    class Norm(torch.nn.RMSNorm):
        """Megatron's own fallback refuses sequence parallelism."""

        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
            super().__init__(hidden_size, eps)
            self.weight.sequence_parallel = config.sequence_parallel

    class Chunk(torch.nn.Module):
        """`forward` as the bridge's: positions are its own."""

        def __init__(self, language_model: torch.nn.Module) -> None:
            super().__init__()
            self.language_model, self.config = language_model, language_model.config
            self.model_type, self.vp_stage = ModelType.encoder_or_decoder, None

        def set_input_tensor(self, tensor: Any) -> None:
            self.language_model.set_input_tensor(tensor)

        def forward(self, input_ids: torch.Tensor, position_ids: None, attention_mask: None) -> torch.Tensor:
            theirs = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
            return self.language_model.forward(input_ids, theirs, attention_mask)

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=128,
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks,
        sequence_parallel=ranks > 1,
        mrope_section=SECTIONS,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        pipeline_dtype=torch.float32,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = transformer_block.LayerNormImpl = Norm
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type="mrope",
        rotary_base=20,
        share_embeddings_and_output_weights=False,
    )
    torch.manual_seed(torch.distributed.get_rank())
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.15)
    return Chunk(model)


def _megatron_on_cpu() -> None:
    """Megatron-Core names the device cuda in a few places; here that is the CPU. For a process of its own."""
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import random

    def here(make: Any, *sizes: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return make(*sizes, device="cpu" if str(device).startswith("cuda") else device, **options)

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.zeros = partial(here, torch.zeros)
    random.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()
    fused_softmax.get_default_causal_mask = lambda length: torch.ones(length, length).triu(1).bool()


if __name__ == "__main__":
    _tensor_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
