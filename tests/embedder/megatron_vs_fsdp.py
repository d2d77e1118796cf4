# SPDX-License-Identifier: Apache-2.0
"""Vectors and gradients of the Embedder under Megatron against those under FSDP2: a tiny checkpoint, by hand, on GPUs.

    python tests/embedder/megatron_vs_fsdp.py [--family qwen3_vl] [--tp 1] [--pp 1] [--dp 1]

needs tp x pp x dp GPUs, Megatron-Core, Megatron-Bridge and Transformer Engine (verl's image). Three runs of the same
mixed rows with the same surrogate loss sum(e * g): FSDP2 in float32 (one GPU; what is right), FSDP2 in bfloat16, and
Megatron in bfloat16 (verl gives it no float32). Megatron passes when its distance to float32 is at most `--slack` times
that of FSDP2 in bfloat16; a wrong token, position, order or loss scale is far outside. Exit status 1 if it does not.

Gradients are compared under the checkpoint's names: Megatron's are written over its weights and exported by the
bridge, which joins shards and splits fused matrices. No optimiser step is taken.

The FSDP2 runs and the comparison alone work on a CPU: `VERL_PLATFORM=cpu ... --only fsdp`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from inputs import LIMITS, mixed_inputs  # a script: its own folder is on the path

ROWS, HIDDEN = 24, 128
MAX_TOKENS = {"megatron": 800, "fsdp16": 100_000, "fsdp32": 100_000}
"""Several micro-batches against one: what a batch is cut into must not show."""


def rows_and_weights(checkpoint: str, family: str) -> tuple[list[Any], torch.Tensor]:
    """The rows, and the gradient (ROWS, HIDDEN) that each vector gets."""
    from embedrl_verl.embedder import EmbedProcessor

    processor = EmbedProcessor.from_pretrained(checkpoint, limits=LIMITS[family])
    rows = [processor.encode(one) for one in mixed_inputs(ROWS)]
    return rows, torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(0))


def surrogate_loss(model_output: dict[str, Any], data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """dp_size * sum <e, gradient>: both engines average over data-parallel ranks."""
    ranks = torch.distributed.get_world_size(dp_group)
    return ranks * (model_output["embeddings"] * data["emb_grad"].float()).sum(), {}


def build_engine(kind: str, checkpoint: str, tp: int, pp: int) -> Any:
    """`fsdp32`, `fsdp16` or `megatron`, initialised."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        McoreEngineConfig,
        McoreOptimizerConfig,
    )
    from verl.workers.engine import EngineRegistry

    from embedrl_verl.embedder.engine import MODEL_TYPE

    engine_config: Any
    if kind == "megatron":
        import embedrl_verl.embedder.megatron_engine  # noqa: F401  (registers it)

        engine_config = McoreEngineConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            use_remove_padding=False,
            use_distributed_optimizer=False,  # every data-parallel rank keeps all gradients; excludes offload in verl
            param_offload=False,
        )
        optimizer_config: Any = McoreOptimizerConfig(lr=1e-4, total_training_steps=1)
    else:
        precision = "fp32" if kind == "fsdp32" else "bf16"
        engine_config = FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype=precision,
            mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            use_torch_compile=False,
        )
        optimizer_config = FSDPOptimizerConfig(lr=1e-4, total_training_steps=1)
    model_config = HFModelConfig(
        path=checkpoint, use_remove_padding=False, override_config={"attn_implementation": "sdpa"}
    )
    model_config.model_type = MODEL_TYPE
    engine = EngineRegistry.new(
        model_type=MODEL_TYPE,
        backend=engine_config.strategy,
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=optimizer_config,
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def gradients_of(engine: Any, kind: str) -> dict[str, torch.Tensor]:
    """Checkpoint name without its model prefix -> float32 gradient on the CPU; parameters without one are left out."""
    if kind != "megatron":
        named = ((name, weight.grad) for name, weight in engine.module.named_parameters() if weight.grad is not None)
        pairs = [(name, grad.full_tensor() if hasattr(grad, "full_tensor") else grad) for name, grad in named]
    else:
        for chunk in engine.module:
            for weight in chunk.parameters():
                weight.data.copy_(weight.main_grad) if weight.requires_grad else weight.data.zero_()
        exported = engine.bridge.export_hf_weights(engine.module, cpu=True, show_progress=False)
        pairs = [(name, weight) for name, weight in exported if name != "lm_head.weight"]
    return {
        name.removeprefix("model.").removeprefix("language_model."): value.detach().float().cpu()
        for name, value in pairs
    }


def run_rank(kind: str, checkpoint: str, family: str, tp: int, pp: int, out: Path) -> None:
    """One process: vectors of its rows, then gradients; the collecting rank of each model replica writes its part."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.device import get_device_name, get_torch_device

    if get_device_name() == "cuda":
        get_torch_device().set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if get_device_name() == "cuda" else "gloo")
    from embedrl_verl.embedder.engine import tensordict_of
    from embedrl_verl.platforms import training_worker  # noqa: F401  (registers verl's engines for the CPU)

    engine = build_engine(kind, checkpoint, tp, pp)
    rows, weights = rows_and_weights(checkpoint, family)
    rank, ranks = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
    mine = list(range(ROWS))[rank::ranks]
    data = tensordict_of([rows[i] for i in mine])
    data["emb_grad"] = weights[mine]
    tu.assign_non_tensor(data, max_token_len_per_gpu=MAX_TOKENS[kind])
    with engine.eval_mode():
        inferred = engine.infer_batch(data)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, surrogate_loss)
        gradients = gradients_of(engine, kind)
    if engine.is_mp_src_rank_with_outputs():
        vectors, again = inferred["model_output"]["embeddings"], output["model_output"]["embeddings"]
        result = {"rows": mine, "vectors": vectors, "again": again, "loss": sum(output["loss"]), "grads": gradients}
        torch.save(result, out / f"{kind}_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def joined(out: Path, kind: str) -> dict[str, Any]:
    """The parts of a run as one: vectors (ROWS, HIDDEN) of inference and of training, loss, gradients."""
    parts = [torch.load(path, weights_only=True) for path in sorted(out.glob(f"{kind}_*.pt"))]
    result: dict[str, Any] = {"vectors": torch.empty(ROWS, HIDDEN), "again": torch.empty(ROWS, HIDDEN)}
    for part in parts:
        for name in ("vectors", "again"):
            result[name][part["rows"]] = part[name]
    return result | {"grads": parts[0]["grads"], "loss": sum(part["loss"] for part in parts) / len(parts)}


def distances(run: dict[str, Any], right: dict[str, Any]) -> dict[str, float]:
    """1 - smallest cosine of the vectors; distance of the gradients relative to their length, over all and at worst."""
    names = sorted(right["grads"])
    if sorted(run["grads"]) != names:
        raise SystemExit(f"gradients must have the same names; they differ in {set(run['grads']) ^ set(names)}")
    apart = torch.stack([(run["grads"][name] - right["grads"][name]).norm() for name in names])
    length = torch.stack([right["grads"][name].norm() for name in names])
    cosine = torch.nn.functional.cosine_similarity
    return {
        "vectors, inference": 1 - cosine(run["vectors"], right["vectors"]).min().item(),
        "vectors, training": 1 - cosine(run["again"], right["vectors"]).min().item(),
        "gradient, all": (apart.norm() / length.norm()).item(),
        "gradient, worst matrix": (apart / length.clamp_min(1e-3 * length.max())).max().item(),
    }


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("qwen2_5_vl", "qwen3_vl"), default="qwen3_vl")
    for name in ("tp", "pp", "dp"):
        parser.add_argument(f"--{name}", type=int, default=1, help="Megatron's ranks of this kind")
    parser.add_argument("--slack", type=float, default=2.0, help="times the distance of FSDP2 in bfloat16")
    parser.add_argument("--only", choices=("all", "fsdp"), default="all")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        a = arguments
        run_rank(a.rank_of, a.checkpoint, a.family, a.tp, a.pp, a.out)
        return

    from recipes.tiny_digits.models import build_tiny_model

    kinds = ["fsdp32", "fsdp16"] if arguments.only == "fsdp" else ["fsdp32", "fsdp16", "megatron"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build_tiny_model(Path(folder) / "model", family=arguments.family, num_layers=4)
        for kind in kinds:
            ranks = arguments.tp * arguments.pp * arguments.dp if kind == "megatron" else 1
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            options = ["--family", arguments.family, "--tp", str(arguments.tp), "--pp", str(arguments.pp)]
            options += ["--rank-of", kind, "--checkpoint", str(checkpoint), "--out", folder]
            subprocess.run([*launch, __file__, *options], check=True)
        right, *runs = [joined(Path(folder), kind) for kind in kinds]
    found = dict(zip(kinds[1:], (distances(run, right) for run in runs), strict=True))
    for kind, values in found.items():
        print(f"{kind} against fsdp32:", ", ".join(f"{name} {value:.2e}" for name, value in values.items()))
    print("losses:", ", ".join(f"{kind} {run['loss']:.5f}" for kind, run in zip(kinds, [right, *runs], strict=True)))
    if "megatron" in found:
        far = [name for name, value in found["megatron"].items() if value > arguments.slack * found["fsdp16"][name]]
        sys.exit(f"megatron is more than {arguments.slack} times as far from float32 as fsdp16: {far}" if far else 0)


if __name__ == "__main__":
    main()
