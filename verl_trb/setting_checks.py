"""Checks of the settings alone: no file, model or machine is looked at (preflight.py does that).

Each takes the composed configuration and raises UserError, one sentence, or returns.
"""

import contextlib
import io
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl_trb import compat
from verl_trb.errors import UserError
from verl_trb.rollout.engine_args import batched_tokens, model_length

ROLLOUT = "actor_rollout_ref.rollout"


def check_environment(config: DictConfig) -> None:
    """Installed versions and the verl and vLLM interfaces we build on."""
    compat.check_versions()
    compat.check_interfaces()


def check_policy(config: DictConfig) -> None:
    """trb.policy is a registered rollout policy, trb.policy_params are values of its parameters, and the command names
    no setting that means nothing with it.
    """
    from verl_trb.guidance import check_guidance, check_idle

    command = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    try:
        check_guidance(config.trb)
        check_idle(config.trb, {item.lstrip("+").partition("=")[0] for item in command})
    except ValueError as error:
        text = str(error)
        raise UserError(text if "trb.policy" in text or "trb.guided_steps" in text else f"trb.policy: {text}") from None


def check_objective(config: DictConfig) -> None:
    """trb.divergence is a registered loss with parameters of its own, and its mode fits the rollouts.

    What a single rollout token contributes (trb.loss=sampled, trb.reward_weight) is weighted by pi_S / mu.
    """
    from verl_trb import objective
    from verl_trb.policies import get_policy

    trb, actor = config.trb, config.actor_rollout_ref.actor
    try:
        policy = get_policy(trb.policy)
    except ValueError:
        return  # check_policy says so
    try:
        objective.check_objective(trb)
    except ValueError as error:
        text = str(error)
        raise UserError(text if "trb." in text else f"trb.divergence: {text}") from None
    needs, rewards = objective.needs(trb), objective.ever_rewards(trb)
    if "corrected_C" in needs and not policy.marks_corrections:
        raise UserError(
            f"trb.divergence={trb.divergence} needs rollouts that mark corrected tokens, which trb.policy={trb.policy} "
            "does not; set trb.policy=saki."
        )
    if (trb.loss == "sampled" or rewards) and not policy.weightable:
        what = "trb.reward_weight > 0" if rewards else "trb.loss=sampled"
        raise UserError(
            f"{what} weights every rollout token by pi_S / mu, which trb.policy={trb.policy} makes useless: it hardly "
            "ever draws some of the student's tokens; choose another policy, or trb.loss=full or topk and no reward."
        )
    if (trb.loss == "sampled" or rewards) and trb.data_share != 0:
        what = "trb.reward_weight > 0" if rewards else "trb.loss=sampled"
        raise UserError(
            f"{what} needs tokens of a known distribution, which the data's responses are not; set trb.data_share=0."
        )
    correction = config.algorithm.rollout_correction
    if rewards and trb.policy != "student" and correction.rollout_is is None:
        raise UserError(
            f"trb.reward_weight > 0 with rollouts of trb.policy={trb.policy} is biased without importance weights; set "
            "algorithm.rollout_correction.rollout_is=sequence (unbiased) or token (less variance)."
        )
    if rewards and actor.entropy_coeff != 0:
        raise UserError(
            f"actor_rollout_ref.actor.entropy_coeff={actor.entropy_coeff} would do nothing while the teacher is read; "
            "set it to 0 with trb.reward_weight."
        )
    if "logp_reference_CV" in needs and not actor.use_kl_loss:
        raise UserError(
            f"trb.divergence={trb.divergence} needs verl's reference model; set "
            "actor_rollout_ref.actor.use_kl_loss=true and actor_rollout_ref.actor.kl_loss_coef=0."
        )


def check_sampling(config: DictConfig) -> None:
    """Rollouts are exact: the student's drafts are shaped by temperature only, so nothing else may shape
    them.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.temperature <= 0 or not rollout.get("do_sample", True):
        raise UserError(
            f"{ROLLOUT}.temperature must be > 0 with do_sample=true: training rollouts are samples of a distribution."
        )
    if rollout.val_kwargs.temperature <= 0:
        raise UserError(
            f"{ROLLOUT}.val_kwargs.temperature must be > 0: the engine samples, it does not decode greedily; 1.0 is "
            "the paper's setting."
        )
    for where, settings in ((ROLLOUT, rollout), (f"{ROLLOUT}.val_kwargs", rollout.val_kwargs)):
        neutral: dict[str, tuple[tuple[Any, ...], str]] = {
            "top_p": ((1,), "1"),
            "top_k": ((-1, 0), "-1"),
            "min_p": ((0,), "0"),
            "repetition_penalty": ((1,), "1"),
            "presence_penalty": ((0,), "0"),
            "frequency_penalty": ((0,), "0"),
            "stop": ((), "null"),
        }
        for name, (values, set_to) in neutral.items():
            value = settings.get(name)
            if value not in (None, *values) and value != []:
                raise UserError(
                    f"{where}.{name}={value} would make rollouts inexact, because the student's drafts "
                    f"know only a temperature; set it to {set_to}."
                )


def check_verl_settings(config: DictConfig) -> None:
    """The parts of verl that verl_trb builds on are chosen, and none that it cannot work with."""
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    required = {
        f"{ROLLOUT}.name": (rollout.name, "trb"),
        f"{ROLLOUT}.mode": (rollout.mode, "async"),
        f"{ROLLOUT}.calculate_log_probs": (rollout.calculate_log_probs, True),
        f"{ROLLOUT}.logprobs_mode": (rollout.logprobs_mode, "processed_logprobs"),
        f"{ROLLOUT}.pipeline_model_parallel_size": (rollout.pipeline_model_parallel_size, 1),
        "actor_rollout_ref.hybrid_engine": (config.actor_rollout_ref.hybrid_engine, True),
        "model_engine": (config.get("model_engine", "dp"), "dp"),
        "trainer.use_v1": (config.trainer.use_v1, True),
        "trainer.v1.trainer_mode": (config.trainer.v1.trainer_mode, "sync"),
        "distillation.enabled": (config.distillation.enabled, False),
    }
    for key, (value, needed) in required.items():
        if value != needed:
            raise UserError(f"{key} must be {str(needed).lower()} for verl_trb, got {value}.")
    if model.lora_rank or model.lora.rank or model.lora_adapter_path:
        _check_lora(config)
    strategies = ("fsdp", "fsdp2")
    if config.actor_rollout_ref.actor.strategy not in strategies:
        raise UserError(f"actor_rollout_ref.actor.strategy must be {' or '.join(strategies)} for verl_trb.")


def _check_lora(config: DictConfig) -> None:
    """Adapters of linear layers, which the rollout engine gets merged into its student."""
    model = config.actor_rollout_ref.model
    where = "actor_rollout_ref.model"
    if not model.lora_rank:
        raise UserError(f"Adapters are asked for by {where}.lora_rank=RANK, not lora.rank or lora_adapter_path alone.")
    if not model.lora.merge:
        raise UserError(
            f"{where}.lora_rank={model.lora_rank} needs {where}.lora.merge=true: the rollout engine's student gets the "
            "adapters merged into its weights."
        )
    targets = [model.target_modules] if isinstance(model.target_modules, str) else list(model.target_modules or [])
    if outer := [name for name in targets if "lm_head" in name or "embed" in name]:
        raise UserError(
            f"{where}.target_modules has {outer[0]}, but adapters can only be on the linear layers inside the model; "
            "all-linear takes those."
        )
    if config.actor_rollout_ref.actor.strategy != "fsdp2":
        raise UserError(f"{where}.lora_rank={model.lora_rank} needs actor_rollout_ref.actor.strategy=fsdp2.")
    if config.actor_rollout_ref.actor.use_kl_loss:
        raise UserError(
            f"{where}.lora_rank={model.lora_rank} with actor_rollout_ref.actor.use_kl_loss=true (method=exopd) has not "
            "been tried here and is refused; train the whole student, or choose another loss."
        )


def check_batches(config: DictConfig) -> None:
    """Batch sizes that divide as verl divides them."""
    batches = batch_table(config)
    for name in ("prompts per step", "rollouts per prompt", "mini-batch, prompts", "devices"):
        if batches[name] < 1:
            raise UserError(
                f"The {name} must be at least 1, got {batches[name]}; see data.train_batch_size, "
                f"{ROLLOUT}.n, actor.ppo_mini_batch_size and trainer.n_gpus_per_node."
            )
    if batches["prompts per step"] % batches["mini-batch, prompts"]:
        raise UserError(
            f"data.train_batch_size={batches['prompts per step']} must be a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={batches['mini-batch, prompts']}."
        )
    if batches["mini-batch, sequences"] % batches["devices"]:
        raise UserError(
            f"A mini-batch of {batches['mini-batch, sequences']} sequences (ppo_mini_batch_size × "
            f"rollout.n) cannot be divided among {batches['devices']} devices; make it a multiple."
        )
    actor = config.actor_rollout_ref.actor
    longest = config.data.max_prompt_length + config.data.max_response_length
    if actor.use_dynamic_bsz:
        if actor.ppo_max_token_len_per_gpu < longest:
            raise UserError(
                f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={actor.ppo_max_token_len_per_gpu} is "
                f"less than the longest sequence, {longest} tokens (prompt + response); raise it."
            )
    elif not actor.ppo_micro_batch_size_per_gpu:
        raise UserError(
            "Set actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu (sequences), or use_dynamic_bsz=true "
            "with ppo_max_token_len_per_gpu."
        )
    if not actor.use_dynamic_bsz:
        # verl reads the log-probabilities of a whole step before it updates on mini-batches.
        for key, size, part in (
            ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", actor.ppo_micro_batch_size_per_gpu, "mini-batch"),
            (
                f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
                config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu or 1,
                "step",
            ),
        ):
            share = batches["mini-batch, sequences" if part == "mini-batch" else "sequences per step"]
            share //= batches["devices"]
            if share % size:
                raise UserError(f"{key}={size} must divide the {share} sequences that a device has of a {part}.")
    parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    if batches["devices"] % parallel:
        raise UserError(
            f"{ROLLOUT}.tensor_model_parallel_size={parallel} does not divide the {batches['devices']} devices."
        )


def check_verl_config(config: DictConfig) -> None:
    """verl's own validation of its part. Late, because it imports verl, which takes seconds."""
    from verl.utils.config import validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            reference = config.actor_rollout_ref.actor.use_kl_loss
            validate_config(config, use_reference_policy=reference, use_critic=False)
    except (AssertionError, ValueError, TypeError, OmegaConfBaseException, HydraException) as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise UserError(f"verl refuses the configuration: {reason}.") from None


def check_platform(config: DictConfig) -> None:
    """verl has an accelerator to work with, or our CPU platform; it would hide that the latter failed to load."""
    compat.assert_platform_registered()


def check_engine_sizes(config: DictConfig) -> None:
    """The engine has room for every row's whole block of drafts: a row without drafts costs a
    resubmission.
    """
    rollout, data, drafts = config.actor_rollout_ref.rollout, config.data, config.trb.draft_tokens
    if data.max_prompt_length < 2 or data.max_response_length < 1:
        raise UserError("data.max_prompt_length must be at least 2 and data.max_response_length at least 1 token.")
    length = model_length(data.max_prompt_length, data.max_response_length, drafts)
    if rollout.max_model_len < length:
        raise UserError(
            f"{ROLLOUT}.max_model_len={rollout.max_model_len} must be at least {length} for prompt, "
            "response and drafts; set it to null to have it computed."
        )
    tokens = batched_tokens(rollout.max_num_seqs, drafts)
    if rollout.max_num_batched_tokens < tokens:
        raise UserError(
            f"{ROLLOUT}.max_num_batched_tokens={rollout.max_num_batched_tokens} must be at least {tokens} "
            f"(max_num_seqs × (draft tokens + 2)); raise it, or lower {ROLLOUT}.max_num_seqs."
        )


def batch_table(config: DictConfig) -> dict[str, int]:
    """How verl divides a training step; mini-batches are counted in prompts by verl's configuration."""
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    prompts, mini = config.data.train_batch_size, actor.ppo_mini_batch_size
    return {
        "prompts per step": prompts,
        "rollouts per prompt": rollout.n,
        "sequences per step": prompts * rollout.n,
        "mini-batch, prompts": mini,
        "mini-batch, sequences": mini * rollout.n,
        "optimizer steps per step": prompts // max(mini, 1) * actor.ppo_epochs,
        "devices": config.trainer.nnodes * config.trainer.n_gpus_per_node,
        "response tokens per step, at most": prompts * rollout.n * config.data.max_response_length,
    }
