# SPDX-License-Identifier: Apache-2.0
"""What this package uses of the inside of verl, vLLM and others, none of which has a stability promise.

`TABLE` states every method that our subclasses override, every function that `patches` replaces, and every attribute
and private function that is read, with its parameters in the releases below, our files that depend on it, and why. A
release that changes one of them makes a row wrong: `moved` (tests/platforms/test_compat.py; for the newest verl,
scripts/newest_verl.sh). Methods that upstream declares abstract are its interface and are left out, and so is
Megatron-Bridge, which has no wheel for a CPU: `embedder/megatron_engine.py` checks its shapes as it runs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from embedrl_verl.errors import PluginError

VERL_VERSION = "0.9.1"
VLLM_VERSION = "0.24.0"
TRANSFORMERS_VERSION = "5.9.0"
RAY_VERSION = "2.60"


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution as its metadata gives it, or None when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def require_version(name: str, found: str | None, expected: str, needed_for: str) -> None:
    """Raises PluginError unless `found` is the release `expected`; a local part such as `+cpu` is ignored."""
    if found is None or found.partition("+")[0] != expected:
        raise PluginError(
            f"{needed_for} is written for {name} {expected}; found {found or 'none'}. "
            f"Install {name}=={expected}, or a release of embedrl-verl made for the other version."
        )


# Classes or modules; our files that depend on names that they define themselves, and why; these names, functions with
# their parameters. Six spaces continue a line.
_TEXT = """
verl.trainer.ppo.v1.trainer_base.PPOTrainer
  in platforms/trainer.py: worker classes of this package, and a mode of another name than verl's own
    __init__(self, config)
    _init_resource_pool_mgr(self)
    role_worker_mapping
  in trainer/setup.py: the Embedder, the judge and batches of whole pairs
    _setup(self)
    fit(self, agent_loop_manager)
    get_reward_handles(self)
    train_dataset, val_dataset, train_dataloader, steps_per_epoch, total_training_steps, global_steps
    reward_loop_manager, resource_pool_manager, parameter_sync_step, local_trigger_step
  in trainer/setup.py, trainer/modes_async.py: batches of whole pairs; prompts are fetched as whole groups
    _init_dataloader(self)
  in trainer/egrl.py, trainer/modes_async.py: the stages of EG-RL; rollouts pause for them
    _compute_reward_colocate(self, batch, metrics=None)
    _validate(self)
  in trainer/egrl.py: the stages of EG-RL, and checkpoints that state what gave the rewards
    _compute_old_log_prob(self, batch, metrics)
    _val_metrics_update(self, data_sources, sample_uids, reward_extra_infos_dict, sample_turns,
      expected_acc_counts=None)
    _dump_generations(self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)
    _save_checkpoint(self)
    on_step_begin(self)
  in trainer/setup.py, trainer/modes_async.py: half-written checkpoints go; prompts are resumed as whole groups
    _load_checkpoint(self)
  in trainer/modes_async.py: prompts are fetched as whole groups; rollouts pause for validation
    _add_prompts_to_generate(self, num_prompts)
    _submit_batch_to_rollout(self, batch)
    step(self, metrics, timing_raw)
    llm_server_manager, checkpoint_manager, _restored_tq_prompt_count
verl.trainer.ppo.v1.trainer_colocate_async.PPOTrainerColocateAsync
  in trainer/modes_async.py: requests that an update interrupts continue with a new seed
    get_llm_client(self)
verl.trainer.ppo.v1.trainer_separate_async.PPOTrainerSeparateAsync
  in trainer/modes_async.py, trainer/egrl.py, trainer/setup.py, platforms/trainer.py: the same, where it has its own
    __init__(self, config)
    _setup(self)
    _init_resource_pool_mgr(self)
    _compute_old_log_prob(self, batch, metrics)
    get_llm_client(self)
    on_step_begin(self)
    standalone_server_manager, _enable_hybrid_replicas
verl.trainer.ppo.v1.trainer_base
  in train.py: is the mode registered?
    TRAINER_REGISTRY
verl.trainer.ppo.v1.replay_buffer.ReplayBuffer
  in trainer/replay_buffer.py: prompts are sampled, dropped and replaced as whole groups of one data source
    __init__(self, trainer_mode, trainer_config, max_off_policy_threshold, max_off_policy_strategy, sampler_kwargs,
      poll_interval=2.0, refill_fn=None, filter_groups_metric=None, train_batch_size=None, gen_batch_size=None,
      max_inflight_gen_batches=1, sync_refill_failed_groups=False)
    _sync_metadata_from_transfer_queue(self)
    _clear_groups(self, partition_id, uids)
    _evict_terminal_groups(self, global_steps, partition_id, eviction_reasons)
    _sampleable_terminal_keys(self, partition_id, eviction_reasons)
    _select_prompt_uids(self, partition_id, sampleable_keys, batch_size)
    _wait_for_next_poll(self, partition_id, last_debug_time)
    partitions, pending_keys, running_keys, finished_keys, failure_keys, prompt_global_steps, refill_fn
verl.trainer.ppo.v1.replay_buffer.ReplayBufferAsync
  in trainer/replay_buffer.py: the same for batches that are waited for
    sample(self, global_steps, partition_id, batch_size)
    wait_for_sampleable(self, global_steps, partition_id, target_count)
    _has_enough_samples(self, global_steps, partition_id, batch_size, sampleable_keys)
    _terminal_eviction_reasons(self, global_steps, partition_id)
verl.experimental.agent_loop.single_turn_agent_loop.SingleTurnAgentLoop
  in trainer/agent_loop.py: evidence and Embedder input of a T-CoT are made as soon as it is generated
    __init__(self, *args, **kwargs)
    run(self, sampling_params, priority=0, **kwargs)
verl.experimental.reward_loop.reward_manager.base.RewardManagerBase
  in trainer/setup.py: a reward manager of whole batches
    __init__(self, config, tokenizer, compute_score)
verl.workers.rollout.llm_server.LLMServerClient
  in trainer/agent_loop.py: a continued request gets a new seed; verl's asynchronous client calls it by super()
    generate(self, request_id, *, prompt_ids, sampling_params, image_data=None, video_data=None, audio_data=None,
      mm_processor_kwargs=None, **kwargs)
verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension
  in platforms/vllm_worker.py: weights are copied on a CPU; the deepstack of Qwen3-VL is cleared on a GPU
    __new__(cls, **kwargs)
    _update_weights(self, weights, peft_config, base_sync_done)
    update_weights_from_ipc(self, peft_config=None, base_sync_done=False, use_shm=False)
    _iter_all_models(self)
  in platforms/claims.py: names the sockets for weights after the Ray job alone
    _get_zmq_handle(self)
verl.workers.engine_workers.TrainingWorker
  in platforms/training_worker.py, embedder/worker.py: position ids are rebuilt; the Embedder is such a worker
    __init__(self, config)
    reset(self)
    set_loss_fn(self, loss_fn)
    train_batch(self, data)
    train_mini_batch(self, data)
    infer_batch(self, data)
    save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None)
    load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False)
    engine, engine_config, config
verl.workers.engine_workers.ActorRolloutRefWorker
  in platforms/training_worker.py: the classes of actor and reference
    actor_worker_cls, ref_worker_cls
verl.experimental.separation.engine_workers.DetachActorWorker
  in platforms/training_worker.py: weights that are put aside on a CPU must be copies
    copy_handler(self)
verl.utils.tensordict_utils
  in platforms/training_worker.py: verl's engines call the first on a batch, which must leave rebuilt ids alone
    maybe_fix_3d_position_ids(data)
  in platforms/training_worker.py, embedder/engine.py: position ids of rows of different lengths
    nested_tensor_from_tensor_list(tensors, ragged_idx=None)
verl.workers.engine.fsdp.transformer_impl.FSDPEngine
  in platforms/training_worker.py, embedder/engine.py: no offload policy on a CPU; the Embedder's model
    _build_fsdp_module(self, module)
    _build_module(self)
    _build_lora_module(self, module)
    _gradient_sync_context(self, *, is_last_micro_batch)
    forward_backward_batch(self, data, loss_function, forward_only=False)
    get_data_parallel_group(self)
    device_mesh, engine_config, model_config, module
verl.workers.engine.megatron.transformer_impl.MegatronEngine
  in embedder/megatron_engine.py: the Embedder's model and micro-batches under Megatron
    __init__(self, model_config, engine_config, optimizer_config, checkpoint_config)
    _build_tf_config(self)
    forward_backward_batch(self, data, loss_function, forward_only=False)
    get_data_parallel_group(self)
    provider, tf_config, param_dtype, module, model_config
verl.utils.megatron.pipeline_parallel
  in embedder/megatron_engine.py: deals micro-batches to virtual stages
    make_batch_generator(batches, vpp_size)
verl.single_controller.ray.base.RayWorkerGroup
  in platforms/patches.py: patched by choose_master_ports_that_stay_free
    _get_master_addr_port(self, pg, bundle_index=0, master_port_range=None)
verl.models.transformers.qwen2_vl, verl.models.transformers.qwen3_vl
  in platforms/patches.py: patched by run_the_vision_model_once and compute_log_probs_in_the_head
    _get_input_embeds(model, input_ids, attention_mask=None, pixel_values=None, pixel_values_videos=None,
      image_grid_thw=None, video_grid_thw=None)
    forward_with_torch_backend(self, input_ids=None, labels=None, temperature=1.0, shift_labels=None, **kwargs)
verl.models.transformers.qwen2_vl
  in platforms/patches.py: runs the model below the fused log-probs; patched by keep_attention_of_transformers
    Qwen2VLCausalLMOutputForPPO
    qwen2_vl_forward(self, input_ids, attention_mask=None, position_ids=None, pixel_values=None,
      pixel_values_videos=None, image_grid_thw=None, video_grid_thw=None, **kwargs)
    qwen2_vl_attn_forward(self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None,
      **kwargs)
verl.models.transformers.qwen3_vl
  in platforms/patches.py: what the fused log-probs return
    Qwen3VLCausalLMOutputForPPO
verl.models.transformers.monkey_patch
  in platforms/patches.py: the backend of a model's fused log-probs
    _verl_fused_kernels_backend
verl.utils.experimental.torch_functional.FusedLinearForPPO
  in platforms/patches.py: called inside lm_head
    forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0)
verl.trainer.main_ppo
  in train.py, platforms/cluster.py: starts a Ray cluster only if this process has joined none
    run_ppo(config, task_runner_class)
    TaskRunnerV1
verl.trainer.constants_ppo
  in platforms/cluster.py: variables that verl gives a cluster
    get_ppo_ray_runtime_env(config=None)
vllm.model_executor.layers.utils
  in platforms/patches.py: patched by keep_cpu_linear_weights
    dispatch_cpu_unquantized_gemm(layer, remove_weight)
vllm.v1.worker.gpu_model_runner.GPUModelRunner
  in platforms/patches.py: patched by rewind_cpu_generators
    _bookkeeping_sync(self, scheduler_output, sampler_output, logits, hidden_states, num_scheduled_tokens)
    input_batch, discard_request_mask, requests
transformers.models.qwen2_vl.modeling_qwen2_vl, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl,
      transformers.models.qwen3_vl.modeling_qwen3_vl, transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe
  in platforms/patches.py: patched by give_vision_rows_at_once
    is_flash_attention_requested
transformers.configuration_utils.PreTrainedConfig
  in platforms/patches.py, embedder/engine.py: the attention of a model
    _attn_implementation
transfer_queue.interface
  in platforms/cluster.py: one controller for a Ray cluster, so a second run in it is refused
    "TransferQueueController"
ray._private.services
  in platforms/cluster.py: will ray.init join a cluster?
    canonicalize_bootstrap_address(addr, temp_dir=None)
ray._private.runtime_env.constants
  in platforms/cluster.py: variables that a job was submitted with
    RAY_JOB_CONFIG_JSON_ENV_VAR
ray._private.utils
  in platforms/ray_cpus.py: the CPUs that ray.init will count
    get_num_cpus(override_docker_cpu_warning=ENV_DISABLE_DOCKER_CPU_WARNING, truncate=True)
ray._private.worker
  in embedder/served/servers.py: the folder of Ray's logs
    _global_node
ray.actor
  in platforms/forkserver/server.py: ids of actor classes are drawn while modules are imported
    ActorClassID
"""


class Row(NamedTuple):
    """One upstream name: its class or module, name, parameters ("" where it has none), our files, and what for."""

    owner: str
    name: str
    parameters: str
    files: tuple[str, ...]
    why: str


def _rows() -> Iterator[Row]:
    owners, files, why = [""], [""], ""
    for line in re.sub(r"\n {6}", " ", _TEXT).strip().splitlines():
        text = line.strip()
        if not line.startswith(" "):
            owners = text.split(", ")
        elif text.startswith("in "):
            listed, _, why = text.removeprefix("in ").partition(": ")
            files = listed.split(", ")
        else:
            for name in [text] if "(" in text else text.split(", "):
                plain, bracket, rest = name.partition("(")
                yield from (Row(owner, plain, bracket + rest, tuple(files), why) for owner in owners)


TABLE: tuple[Row, ...] = tuple(_rows())


def moved(package: str = "", root: Path | None = None) -> list[str]:
    """The rows that do not hold, a line each. Upstream's source is read; nothing of it is imported.

    Args:
        package: only names of this one (`verl`).
        root: the folder that holds it; None = the installed one.
    """
    lines = []
    for row in TABLE:
        found = parameters_of(row.owner, row.name, root) if row.owner.startswith(package) else row.parameters
        if found is None or (row.parameters and found != row.parameters):
            state = "is gone" if found is None else f"has now the parameters {found}, not {row.parameters}"
            files = ", ".join(f"embedrl_verl/{file}" for file in row.files)
            lines.append(f"{row.owner}.{row.name} {state}; look at {files} ({row.why})")
    return lines


def parameters_of(owner: str, name: str, root: Path | None = None) -> str | None:
    """Parameters of a function that a class or module defines itself, "" of anything else, None if there is none."""
    node, inner = _module_of(owner, root)
    for part in inner:
        classes = (one for one in getattr(node, "body", ()) if isinstance(one, ast.ClassDef))
        node = next((one for one in classes if one.name == part), None)
    if node is None:
        return None
    for one in node.body:
        if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef)) and one.name == name:
            for argument in ast.walk(one.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            return f"({ast.unparse(one.args)})"
    return "" if any(_named(one) == name for one in ast.walk(node)) else None


def _named(node: ast.AST) -> str | None:
    """The name that a node binds: a class, an import, the target of an assignment (attributes of objects too); or a
    text, in quotes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return f'"{node.value}"'
    if isinstance(node, ast.ClassDef):
        return node.name
    if isinstance(node, ast.alias):
        return node.asname or node.name
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    return None


def _module_of(owner: str, root: Path | None) -> tuple[Any, list[str]]:
    """The parsed module of a dotted name, and what of the name lies in it."""
    parts = owner.split(".")
    if root is None:
        spec = find_spec(parts[0])
        if spec is None or spec.origin is None:
            return None, []
        root = Path(spec.origin).parents[1]
    for count in range(len(parts), 0, -1):
        place = root.joinpath(*parts[:count])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return _parsed(file), parts[count:]
    return None, []


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())
