# SPDX-License-Identifier: Apache-2.0
"""Stock verl's `main_ppo` with plain GRPO, a toy reward and a tiny Qwen2-VL: what the platform tests run, and a
person can too.

`python tests/platforms/plain_grpo.py OUT_DIR [hydra overrides]` builds model and data in OUT_DIR and runs three
steps.
"""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from embedrl_verl.platforms.forkserver import python
from recipes.tiny_digits.environment import CPU_ENV
from recipes.tiny_digits.models import build_tiny_model

# With the executor "uni": the model runs in vLLM's engine process instead of one more process.
EXTENSION = "embedrl_verl.platforms.vllm_worker.CpuColocateWorkerExtension"
ENV = {**CPU_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **kwargs: object) -> float:
    """Toy reward: the share of digits among the characters of the answer."""
    return sum(character.isdigit() for character in solution_str) / max(len(solution_str), 1)


def write_prompts(path: Path, rows: int, *, lengths: int = 3) -> None:
    """`rows` prompts of verl's stock dataset format, each with one 56x56 image and one of `lengths` texts."""
    generator = np.random.default_rng(0)
    records = []
    for index in range(rows):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(buffer, format="PNG")
        records.append(
            {
                "data_source": "toy",
                "prompt": [{"role": "user", "content": "<image>" + "read " * (1 + index % lengths)}],
                "images": [{"bytes": buffer.getvalue()}],
                "reward_model": {"style": "rule", "ground_truth": "7"},
                "extra_info": {"index": index},
            }
        )
    pq.write_table(pa.Table.from_pylist(records), path)


def overrides(out_dir: Path, steps: int = 3, ranks: int = 1) -> list[str]:
    """The hydra overrides of a run of `steps` steps on `ranks` data-parallel CPU ranks."""
    actor, rollout, micro = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", 16 // ranks
    fp32 = "mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    text = f"""
        trainer.v1.trainer_mode=plain_sync trainer.device=cpu algorithm.adv_estimator=grpo
        data.train_files={out_dir / "train.parquet"} data.val_files={out_dir / "train.parquet"}
        data.train_batch_size=4 data.max_prompt_length=128 data.max_response_length=32
        data.image_key=images data.dataloader_num_workers=0
        actor_rollout_ref.model.path={out_dir / "model"} actor_rollout_ref.model.use_remove_padding=False
        actor_rollout_ref.model.enable_gradient_checkpointing=False
        +actor_rollout_ref.model.override_config.attn_implementation=sdpa
        {actor}.strategy=fsdp2 {actor}.fsdp_config.strategy=fsdp2
        {actor}.fsdp_config.use_torch_compile=False {actor}.use_torch_compile=False
        {actor}.ppo_mini_batch_size=4 {actor}.ppo_micro_batch_size_per_gpu={micro} {actor}.use_kl_loss=True
        +{actor}.fsdp_config.{fp32} +actor_rollout_ref.ref.fsdp_config.{fp32} {actor}.optim.lr=1e-3
        actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu={micro}
        {rollout}.name=vllm {rollout}.n=4 {rollout}.dtype=float32 {rollout}.load_format=safetensors
        {rollout}.enforce_eager=True {rollout}.free_cache_engine=False +{rollout}.enable_sleep_mode=False
        {rollout}.calculate_log_probs=True {rollout}.log_prob_micro_batch_size_per_gpu={micro}
        {rollout}.tensor_model_parallel_size=1 {rollout}.max_model_len=512
        {rollout}.max_num_batched_tokens=2048 {rollout}.max_num_seqs=32 {rollout}.agent.num_workers=1
        {rollout}.checkpoint_engine.update_weights_bucket_megabytes=64
        +{rollout}.engine_kwargs.vllm.worker_extension_cls={EXTENSION}
        +{rollout}.engine_kwargs.vllm.distributed_executor_backend=uni
        reward.num_workers=1 reward.custom_reward_function.path={Path(__file__).resolve()}
        transfer_queue.backend.SimpleStorage.num_data_storage_units=1
        +ray_kwargs.ray_init.address=local ray_kwargs.ray_init.num_cpus={3 * ranks + 2}
        +ray_kwargs.ray_init.num_gpus={ranks} +ray_kwargs.ray_init.include_dashboard=False
        trainer.nnodes=1 trainer.n_gpus_per_node={ranks} trainer.total_training_steps={steps} trainer.total_epochs=100
        trainer.logger=[console] trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1
        trainer.default_local_dir={out_dir / "checkpoints"}
    """
    return text.split()


def run(
    out_dir: Path, extra: Sequence[str] = (), *, steps: int = 3, ranks: int = 1, lengths: int = 3
) -> list[dict[str, float]]:
    """Builds model and data in `out_dir`, runs `python -m verl.trainer.main_ppo`, returns each step's metrics.

    The output, stderr included, is in `out_dir / "log.txt"`; RuntimeError carries its end when the run fails.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    build_tiny_model(out_dir / "model", tied=True)  # weights that two modules share reach vLLM
    write_prompts(out_dir / "train.parquet", rows=12, lengths=lengths)
    forked = f"ray_kwargs.ray_init.runtime_env.py_executable={python()}"
    command = [python(), "-m", "verl.trainer.main_ppo", *overrides(out_dir, steps, ranks), forked, *extra]
    with (out_dir / "log.txt").open("w") as log:
        process = subprocess.run(
            command, env={**os.environ, **ENV}, stdout=log, stderr=subprocess.STDOUT, timeout=900, check=False
        )
    text = (out_dir / "log.txt").read_text()
    if process.returncode != 0:
        raise RuntimeError(f"main_ppo must exit with 0; got {process.returncode}. Output:\n{text[-6000:]}")
    return [step_metrics(line) for line in text.splitlines() if " step:" in line and "training/global_step" in line]


def step_metrics(line: str) -> dict[str, float]:
    """The numbers of verl's console line `step:1 - name:value - name:value`."""
    pairs = (part.rpartition(":") for part in line[line.index("step:") :].split(" - "))
    return {name: float(re.sub(r"np\.\w+\((.*)\)", r"\1", value)) for name, _, value in pairs}


if __name__ == "__main__":
    start = time.time()
    for metrics in run(Path(sys.argv[1]), sys.argv[2:]):
        shown = ("training/rollout_actor_probs_pearson_corr", "actor/kl_loss", "critic/score/mean", "timing_s/step")
        print({name: metrics[name] for name in ("step", *shown)})
    print(f"{time.time() - start:.1f} s in all")
