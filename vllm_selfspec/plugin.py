"""The plugin: the one table of every place in vLLM that selfspec touches.

`register()` is the `vllm.general_plugins` entry point. vLLM calls it in every process, sometimes twice; it only makes
the engine arguments understand `method: selfspec` and workers look at what they are given. The worker's seams are
applied when a worker is built for a selfspec config, so an engine without the flag runs vLLM as it came.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm_selfspec.config import ENV_VAR, ConfigError, SelfSpecConfig

logger = logging.getLogger("vllm.selfspec")

SUPPORTED_VLLM = ("0.24", "0.25", "0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32", "0.33")
"""Minor versions of vLLM that the engine tests have run on; any other refuses the flag and is else left untouched."""

FIRST_WHOLE_VLLM = "0.29"
"""From this minor version on selfspec has CPUs, model runner V2 and rollout pools; before it only runner V1 on CUDA."""

INSTALL_VLLM = f"vllm {SUPPORTED_VLLM[0]} to {SUPPORTED_VLLM[-1]}"


class SeamError(RuntimeError):
    """The installed vLLM does not look as the seam table expects."""


@dataclass(frozen=True)
class Seam:
    """One attribute of vLLM that selfspec wraps.

    Attributes:
        target: `module:Class.attribute` or `module:function`.
        why: what the wrapper adds.
        parameters: parameter names the original must have, in any order.
        wrapper: `module:function` of selfspec; called as `wrapper(original, *args, **kwargs)`.
        needed: `module:function` that says, true or false, whether the original wants mending here; None: always.
        since: the first minor version of vLLM with this seam; "": all that are supported.
        before: the first minor version that does without.
    """

    target: str
    why: str
    parameters: tuple[str, ...]
    wrapper: str
    needed: str | None = None
    since: str = ""
    before: str = ""

    def concerns_this_version(self) -> bool:
        """Whether it is a seam of the installed vLLM."""
        return not (self.since and older_than(self.since)) and (not self.before or older_than(self.before))

    def apply(self) -> None:
        """Wrap the target, once, where it is needed.

        Raises:
            SeamError: if the target is missing or takes other parameters than expected.
        """
        if not self.concerns_this_version():
            return
        owner, name = _owner(self.target)
        original = getattr(owner, name, None)
        if original is None:
            raise SeamError(f"vLLM has no {self.target}: install {INSTALL_VLLM}.")
        if getattr(original, "_selfspec_seam", None) == self.target:
            return
        missing = set(self.parameters) - set(inspect.signature(original).parameters)
        if missing:
            raise SeamError(
                f"{self.target} takes no {', '.join(sorted(missing))} in this vLLM: install {INSTALL_VLLM}."
            )
        if self.needed is None or _function(self.needed)():
            setattr(owner, name, _wrapped(original, self))


def _wrapped(original: Callable[..., Any], seam: Seam) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper()(original, *args, **kwargs)

    @functools.cache
    def wrapper() -> Callable[..., Any]:
        return _function(seam.wrapper)

    call._selfspec_seam = seam.target  # type: ignore[attr-defined]  # marks the wrapper, so that it is applied once
    return call


def _owner(path: str) -> tuple[Any, str]:
    module, _, attribute = path.partition(":")
    *parents, name = attribute.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _function(path: str) -> Callable[..., Any]:
    owner, name = _owner(path)
    function: Callable[..., Any] = getattr(owner, name)
    return function


EVERYWHERE = (
    Seam(
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        "understands method selfspec and VLLM_SELFSPEC, and selects the scheduler",
        ("self", "target_model_config", "target_parallel_config"),
        "vllm_selfspec.plugin:create_speculative_config",
    ),
    Seam(
        "vllm.v1.worker.worker_base:WorkerBase.__init__",
        "a worker for a selfspec config applies the seams below first, after vLLM has set up its platform's kernels",
        ("self", "vllm_config"),
        "vllm_selfspec.plugin:worker_init",
    ),
    Seam(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        "takes selfspec's step counts out of the scheduler statistics and adds them to the Prometheus metrics",
        ("self", "scheduler_stats"),
        "vllm_selfspec.metrics:record",
    ),
    Seam(
        "vllm.sampling_params:SamplingParams.verify",
        "a request whose own limit of drafts is no number is refused before it reaches the engine",
        ("self", "model_config", "speculative_config"),
        "vllm_selfspec.speculative_config:verify_sampling_params",
    ),
    Seam(
        "vllm.v1.engine.core:EngineCore.__init__",
        "weights on a CPU move to huge pages; an adaptive engine times itself, or loads its profile, before requests",
        ("self", "vllm_config"),
        "vllm_selfspec.live_profile:core_init",
    ),
    Seam(
        "vllm.config.vllm:VllmConfig._maybe_disable_dynamic_sd_for_data_parallel",
        "draft lengths vary under data parallelism too, where each rank is an engine of its own",
        ("self",),
        "vllm_selfspec.speculative_config:keep_draft_lengths",
        since="0.26",
    ),
    Seam(
        "vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features",
        "runner V2 drafts for selfspec where vLLM itself has no draft model for it",
        ("self",),
        "vllm_selfspec.drafter.runner:unsupported_on_v2",
        since=FIRST_WHOLE_VLLM,
        before="0.31",
    ),
)

IN_OTHER_VERSIONS = Seam(
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
    "a version of vLLM that is not supported refuses method selfspec and VLLM_SELFSPEC instead of running without",
    ("self",),
    "vllm_selfspec.plugin:refuse",
)

IN_WORKERS = (
    Seam(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.__init__",
        "runner V1 builds the self-drafter where it would build a draft model's proposer",
        ("self", "vllm_config", "device"),
        "vllm_selfspec.drafter.proposer:runner_init",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
        "the drafter drafts with the view that the scheduler has chosen",
        ("self", "scheduler_output"),
        "vllm_selfspec.drafter.proposer:propose_draft_token_ids",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._check_and_update_cudagraph_mode",
        "the drafter has CUDA graphs, which vLLM gives to draft models since 0.26",
        ("self",),
        "vllm_selfspec.drafter.proposer:check_and_update_cudagraph_mode",
        before="0.26",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_spec_decode_draft_probs",
        "the probabilities of all drafts are not copied where they lie in order",
        ("self", "spec_decode_metadata"),
        "vllm_selfspec.drafter.proposer:verified_draft_probs",
    ),
    Seam(
        "vllm.model_executor.layers.linear:UnquantizedLinearMethod.process_weights_after_loading",
        "the only place where a CPU linear layer's full weight exists: the drafter quantizes it there",
        ("self", "layer"),
        "vllm_selfspec.drafter.refresh:process_weights_after_loading",
    ),
    Seam(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.process_weights_after_loading",
        "the same for the LM head",
        ("self", "layer"),
        "vllm_selfspec.drafter.refresh:process_weights_after_loading",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod"
        ".process_weights_after_loading",
        "the same for experts, which are packed on CPU and for some kernels on GPUs",
        ("self", "layer"),
        "vllm_selfspec.drafter.refresh:process_weights_after_loading",
    ),
    *(
        Seam(
            f"vllm.v1.worker.gpu_worker:Worker.{method}",
            "the target has other weights now: the drafter quantizes again before its next proposal",
            ("self",),
            "vllm_selfspec.drafter.refresh:update_ends",
            since=since,
        )
        for method, since in (
            ("finish_weight_update", ""),
            ("reload_weights", ""),
            ("wake_up", ""),
            ("reset_weights", "0.32"),
        )
    ),
    *(
        Seam(
            f"vllm.v1.worker.gpu_worker:Worker.{method}",
            "the view has no weights of its own to update: loading into it would take the target's apart",
            ("self",),
            f"vllm_selfspec.drafter.refresh:{wrapper}",
            since=since,
        )
        for method, wrapper, since in (
            ("supports_draft_weight_updates", "supports_draft_weight_updates", "0.28"),
            ("_set_draft_weight_update_target", "refuse_draft_weights", "0.26"),
        )
    ),
    Seam(
        "vllm.v1.worker.gpu_worker:Worker.sample_tokens",
        "tells the scheduler what following the weights has cost, for the metrics",
        ("self", "grammar_output"),
        "vllm_selfspec.drafter.refresh:sample_tokens",
    ),
)

TIED_LM_HEAD = Seam(
    "vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_processing",
    "a tied LM head computes from the new weights after a layerwise reload on CPU",
    ("model",),
    "vllm_selfspec.compat.tied_lm_head:finalize",
    needed="vllm_selfspec.compat.tied_lm_head:broken",
)

MENDS = (
    TIED_LM_HEAD,
    Seam(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",
        "experts compute from the new weights after a layerwise reload on CPU",
        ("self", "layer"),
        "vllm_selfspec.compat.cpu_experts_reload:setup_kernel",
        needed="vllm_selfspec.compat.cpu_experts_reload:broken",
    ),
    Seam(
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        "temperature, top-k and top-p of speculated tokens are initialised on CPU",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        "vllm_selfspec.compat.cpu_expand:expand_batch_to_tokens",
        needed="vllm_selfspec.compat.cpu_expand:broken",
    ),
    Seam(
        "vllm.v1.sample.rejection_sampler:apply_top_k_top_p",
        "top-k of no rows is no error on CPU",
        ("logits", "k", "p"),
        "vllm_selfspec.compat.cpu_empty_top_k:apply_top_k_top_p",
        needed="vllm_selfspec.compat.cpu_empty_top_k:broken",
    ),
    *(  # in this order: without the last one vLLM is still broken
        Seam(
            target, why, parameters, f"vllm_selfspec.compat.min_tokens:{name}", "vllm_selfspec.compat.min_tokens:broken"
        )
        for target, why, parameters, name in (
            (
                "vllm.v1.worker.gpu_input_batch:InputBatch._make_sampling_metadata",
                "min_tokens has the tokens that are known",
                ("self",),
                "make_sampling_metadata",
            ),
            (
                "vllm.v1.sample.sampler:Sampler.apply_logits_processors",
                "min_tokens counts the drafts before a bonus token",
                ("self", "logits", "sampling_metadata", "predict_bonus_token"),
                "apply_logits_processors",
            ),
            (
                "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor.update_state",
                "min_tokens does not count drafts before they are verified",
                ("self", "batch_update"),
                "update_state",
            ),
        )
    ),
    *(
        Seam(
            f"vllm.v1.worker.gpu_model_runner:GPUModelRunner.{method}",
            "a prompt of several steps does not stop the engine when its request has a seed, on CPU",
            ("self",),
            f"vllm_selfspec.compat.cpu_seeded_chunks:{method.lstrip('_')}",
            needed="vllm_selfspec.compat.cpu_seeded_chunks:broken",
        )
        for method in ("_sample", "_bookkeeping_sync")
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._preprocess",
        "the target is given no placeholder for a token",
        ("self", "scheduler_output", "num_input_tokens"),
        "vllm_selfspec.compat.draft_placeholders:preprocess",
        before="0.25",
    ),
)
"""Upstream faults, in workers: applied where the fault is found."""

IN_CPU_WORKERS = (
    Seam(
        "vllm.compilation.decorators:_try_load_aot_compiled_fn",
        "compiled graphs are loaded from vLLM's cache on CPU too",
        ("model", "aot_compilation_path"),
        "vllm_selfspec.compat.cpu_aot_cache:try_load",
    ),
    Seam(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        "bfloat16 and float16 layers run at the memory's speed on CPUs without AMX",
        ("layer", "remove_weight"),
        "vllm_selfspec.compat.cpu_half_linear:dispatch",
        needed="vllm_selfspec.drafter.cpu_kernels:badly_served",
    ),
    Seam(
        "vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
        "recovered tokens are drawn only where a draft was rejected, and large tensors are kept from step to step",
        ("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
        "vllm_selfspec.compat.cpu_sampling:forward",
    ),
    Seam(
        "vllm.v1.sample.sampler:Sampler.forward",
        "where only a temperature shapes a distribution, logits are read as the model leaves them",
        ("self", "logits", "sampling_metadata"),
        "vllm_selfspec.compat.cpu_sampling:sampler_forward",
    ),
    Seam(
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_cpu",
        "a token takes one random number, not one per vocabulary entry",
        ("self", "logits", "generators", "k", "p"),
        "vllm_selfspec.compat.cpu_sampling:sample",
    ),
)

IN_V2_WORKERS = (
    Seam(
        "vllm.v1.worker.gpu.model_runner:init_speculator",
        "runner V2 builds the self-drafter where it would build a draft model's speculator",
        ("vllm_config", "device"),
        "vllm_selfspec.drafter.speculator:init_speculator",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
        "the drafter hears how many tokens the scheduler wants drafted",
        ("self", "scheduler_output"),
        "vllm_selfspec.drafter.speculator:execute_model",
        before="0.32",
    ),
    Seam(
        "vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables",
        "the drafter knows how many KV blocks a request owns after the host has gone on to the next steps",
        ("self", "idx_mapping"),
        "vllm_selfspec.drafter.speculator:gather_block_tables",
    ),
    Seam(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates",
        "every draft length has CUDA graphs for its batches, and plain decoding keeps those that it has without drafts",
        ("self",),
        "vllm_selfspec.drafter.verify_graphs:init_candidates",
    ),
)

WORKER_METHODS = {
    "selfspec_refresh": "vllm_selfspec.drafter.refresh:selfspec_refresh",
    "selfspec_light_view": "vllm_selfspec.drafter.proposer:selfspec_light_view",
    "selfspec_use_huge_pages": "vllm_selfspec.drafter.proposer:selfspec_use_huge_pages",
}
"""Methods added to vLLM's worker, for `collective_rpc`."""


def supports(version: str, cpu: bool = False) -> bool:
    """Whether the engine tests have run on this version of vLLM.

    Args:
        cpu: a build for CPUs.
    """
    minor = ".".join(version.split(".")[:2])
    return minor in SUPPORTED_VLLM[SUPPORTED_VLLM.index(FIRST_WHOLE_VLLM) if cpu else 0 :]


def older_than(version: str) -> bool:
    """Whether the installed vLLM, one that is supported, comes before minor version `version`."""
    import vllm

    installed = ".".join(vllm.__version__.split(".")[:2])
    return SUPPORTED_VLLM.index(installed) < SUPPORTED_VLLM.index(version)


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; re-entrant."""
    import vllm

    if not supports(vllm.__version__):
        with suppress(SeamError, ImportError, AttributeError):  # vLLM itself knows no method selfspec
            IN_OTHER_VERSIONS.apply()
        return
    for seam in EVERYWHERE:
        seam.apply()
    from vllm_selfspec.rollout.weights import register_weight_transfer

    register_weight_transfer()


def worker_init(original: Callable[..., None], self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """`WorkerBase.__init__`, preceded by the worker's seams and mends when its config asks for selfspec."""
    if isinstance(getattr(vllm_config.speculative_config, "selfspec", None), SelfSpecConfig):
        from vllm.platforms import current_platform

        seams = IN_WORKERS + MENDS
        if current_platform.is_cpu():
            seams += IN_CPU_WORKERS
        if vllm_config.use_v2_model_runner:
            seams += IN_V2_WORKERS
        for seam in seams:
            seam.apply()
        for name, path in WORKER_METHODS.items():
            setattr(_owner(f"vllm.v1.worker.gpu_worker:Worker.{name}")[0], name, _function(path))
    original(self, vllm_config, *args, **kwargs)


def refuse(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`EngineArgs.create_speculative_config` of a vLLM that is not supported."""
    import vllm

    asked = getattr(self, "speculative_config", None)
    method = asked.get("method") if isinstance(asked, dict) else getattr(self, "spec_method", None)
    if method is None and asked is None and SelfSpecConfig.from_env(os.environ.get(ENV_VAR, "")):
        method = "selfspec"
    if method == "selfspec":
        raise ConfigError(
            f"method selfspec runs on {INSTALL_VLLM}, and this is {vllm.__version__}: install one of them, or remove "
            f"the speculative config and {ENV_VAR}."
        )
    return original(self, *args, **kwargs)


class _OwnScheduler(str):
    """`scheduler_cls` as selfspec sets it; it says so wherever engine arguments are copied to."""

    one_kv_group = False
    """Whether `disable_hybrid_kv_cache_manager` was set along with it."""
    asynchronous = False
    """Whether `async_scheduling` was."""


def create_speculative_config(
    original: Callable[..., Any], self: Any, target_model_config: Any, target_parallel_config: Any
) -> Any:
    """`EngineArgs.create_speculative_config`, for the dict of `method: selfspec`; vLLM's own for any other."""
    if isinstance(self.scheduler_cls, _OwnScheduler):  # the same arguments may make one config after another
        if self.scheduler_cls.one_kv_group and self.disable_hybrid_kv_cache_manager:
            self.disable_hybrid_kv_cache_manager = None
        if self.scheduler_cls.asynchronous and self.async_scheduling:
            self.async_scheduling = None
        self.scheduler_cls = None
    settings = requested_settings(self)
    if settings is not None and left_to_the_environment(self) and target_model_config.runner_type != "generate":
        settings = None
        logger.warning("%s does not apply to this engine, which writes no text.", ENV_VAR)
    if settings is None:
        return original(self, target_model_config, target_parallel_config)
    from vllm_selfspec.speculative_config import attention_kinds, build, schedules_asynchronously

    if self.scheduler_cls is not None:
        raise ConfigError(
            f"scheduler_cls is {self.scheduler_cls!r}, but method selfspec brings its own: remove one of the two."
        )
    speculative_config = build(settings, target_model_config, target_parallel_config, self.enable_lora)
    self.scheduler_cls = scheduler = _OwnScheduler("vllm_selfspec.scheduler.build_scheduler")
    if self.disable_hybrid_kv_cache_manager is None and attention_kinds(target_model_config) > 1:
        self.disable_hybrid_kv_cache_manager = scheduler.one_kv_group = True
        logger.info("selfspec sets disable_hybrid_kv_cache_manager: the KV cache of layers with windows is kept whole.")
    if self.async_scheduling is None and older_than("0.28") and schedules_asynchronously(target_parallel_config):
        self.async_scheduling = scheduler.asynchronous = True
    return speculative_config


def left_to_the_environment(engine_args: Any) -> bool:
    """Whether engine arguments say nothing about speculation."""
    return engine_args.speculative_config is None and engine_args.spec_method is None


def requested_settings(engine_args: Any) -> SelfSpecConfig | None:
    """The selfspec settings that these engine arguments or the environment ask for, if any."""
    if left_to_the_environment(engine_args):
        return SelfSpecConfig.from_env(os.environ.get(ENV_VAR, ""))
    raw = {key.replace("-", "_"): value for key, value in (engine_args.speculative_config or {}).items()}
    if engine_args.spec_method is not None:
        raw.setdefault("method", engine_args.spec_method)
    if raw.get("method") != "selfspec":
        return None
    if engine_args.spec_tokens is not None:
        raw.setdefault("num_speculative_tokens", engine_args.spec_tokens)
    return SelfSpecConfig.parse(raw)
