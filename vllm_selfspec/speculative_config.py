"""vLLM's `SpeculativeConfig`, as selfspec fills it in.

To vLLM a self-drafter looks like `method="draft_model"` whose draft model is the target: that makes it reserve the
lookahead slots, keep asynchronous scheduling, and hand `propose()` everything it needs. The subclass carries the
user's own settings to the workers (it is pickled on the way).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.config.utils import config
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

from vllm_selfspec.config import ConfigError, DrafterConfig, SelfSpecConfig
from vllm_selfspec.drafter import exit_head
from vllm_selfspec.drafter.cpu_kernels import library_in_use
from vllm_selfspec.drafter.runner import choose_runner, every_draft_length
from vllm_selfspec.plugin import register

REQUEST_CAP = "selfspec_max_draft_tokens"
"""Key of `SamplingParams.extra_args`: the most tokens drafted in one step for this request; 0 switches drafting off."""


@config
class SelfSpecSpeculativeConfig(SpeculativeConfig):
    """`SpeculativeConfig` of a model that drafts for itself."""

    selfspec: Any = None
    """The checked `SelfSpecConfig`."""

    def __post_init__(self) -> None:
        assert isinstance(self.selfspec, SelfSpecConfig)
        assert self.target_model_config is not None
        self.method = "draft_model"
        self.model = self.target_model_config.model
        self.num_speculative_tokens = self.selfspec.num_speculative_tokens
        self.draft_sample_method = "probabilistic"
        # The runner stops drafting for the whole batch when one request comes within num_speculative_tokens of the
        # drafter's max_model_len. The self-drafter handles that edge per request, so it asks for that much more.
        self.draft_model_config = copy.copy(self.target_model_config)
        self.draft_model_config.max_model_len += self.num_speculative_tokens
        self.draft_parallel_config = self.target_parallel_config
        self.draft_tensor_parallel_size = self.target_parallel_config.tensor_parallel_size
        if current_platform.is_cuda() and self.selfspec.control.mode != "fixed":
            # vLLM sizes its CUDA graphs for the lengths in this table; the scheduler picks among them by its own rule.
            self.num_speculative_tokens_per_batch_size = every_draft_length(self.num_speculative_tokens)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # It arrives in a new process before that has loaded its plugins: vLLM does so inside the very constructor of
        # the engine core that is to be wrapped.
        register()
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"SpeculativeConfig({self.selfspec!r})"

    def compute_hash(self) -> str:
        """vLLM's hash plus the drafter and the kernels: compiled graphs are cached under this key.

        How many tokens are drafted is no part of it, nor of a graph: one forward pass makes one draft.
        """
        drafter = self.selfspec.drafter
        shape = None if drafter.exit_head is None else exit_head.read_info(drafter.exit_head)
        alike = copy.copy(self)
        alike.draft_model_config = self.target_model_config
        key = f"{SpeculativeConfig.compute_hash(alike)}{drafter.model_dump_json()}{shape}{library_in_use()}"
        return hashlib.sha256(key.encode()).hexdigest()

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """Rows that a request's drafts add to the target's batch: none, a draft's forward pass is one of its own."""
        return 0

    def uses_dynamic_speculative_decoding(self) -> bool:
        """True when the draft length may change from step to step."""
        return self.selfspec.control.mode != "fixed"


def build(
    settings: SelfSpecConfig, model: ModelConfig, parallel: ParallelConfig, lora: bool = False
) -> SelfSpecSpeculativeConfig:
    """The engine's speculative config for `settings`.

    Args:
        lora: the engine serves adapters.

    Raises:
        ConfigError: if this model or this parallel layout cannot be drafted for; the sentence names the field.
    """
    choose_runner(lora)
    check_engine(settings, model, parallel)
    return SelfSpecSpeculativeConfig(
        selfspec=settings,
        num_speculative_tokens=settings.num_speculative_tokens,
        target_model_config=model,
        target_parallel_config=parallel,
    )


def request_cap(extra_args: dict[str, Any] | None) -> int | None:
    """The most tokens that one request allows to be drafted for it, None where it does not say.

    Raises:
        ConfigError: it is no whole number from 0 up.
    """
    cap = (extra_args or {}).get(REQUEST_CAP)
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 0):
        raise ConfigError(f"extra_args[{REQUEST_CAP!r}] is {cap!r}: give a whole number from 0 up.")
    return cap


def verify_sampling_params(
    original: Callable[..., None], self: Any, model_config: Any, speculative_config: Any, *args: Any, **kwargs: Any
) -> None:
    """`SamplingParams.verify`, which refuses a request before it reaches the engine, where an error ends all."""
    if isinstance(speculative_config, SelfSpecSpeculativeConfig):
        try:
            request_cap(self.extra_args)
        except ConfigError as error:
            raise VLLMValidationError(str(error), parameter="extra_args") from error
        if getattr(self, "logprob_token_ids", None) and envs.VLLM_USE_V2_MODEL_RUNNER is False:
            raise VLLMValidationError(
                "logprob_token_ids does not work with method selfspec on model runner V1, whose rejection sampler has "
                "no log-probabilities of given tokens: ask for logprobs instead.",
                parameter="logprob_token_ids",
            )
    original(self, model_config, speculative_config, *args, **kwargs)


def keep_draft_lengths(original: Callable[..., None], self: VllmConfig) -> None:
    """`VllmConfig._maybe_disable_dynamic_sd_for_data_parallel`, which takes the table of draft lengths away.

    It does so because ranks that draft together would have to agree. Those of a dense model are engines of their own,
    and a mixture of experts is refused unless its length is fixed.
    """
    if not isinstance(self.speculative_config, SelfSpecSpeculativeConfig):
        original(self)


def draft_together(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Whether the ranks of data parallelism run every forward pass together, those of drafts included."""
    return bool(model.is_moe) and parallel.data_parallel_size > 1


def one_scheduler_per_rank(parallel: ParallelConfig) -> bool:
    """Whether each rank schedules for itself, so that all must decide alike from what all of them see."""
    return parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1


def schedules_asynchronously(parallel: ParallelConfig) -> bool:
    """Whether the engine can do so. Before vLLM 0.28 one with a draft model does not unless it is told to."""
    from vllm.v1.executor import Executor

    executor: Any = Executor.get_class(SimpleNamespace(parallel_config=parallel))
    return bool(executor.supports_async_scheduling())


def attention_kinds(model: ModelConfig) -> int:
    """How many kinds of attention layers the model says it has, such as windowed and full ones.

    vLLM would keep the KV cache of each kind in blocks of its own, and the drafter knows one table of blocks: the cache
    of all layers is kept as that of the full ones, which `--disable-hybrid-kv-cache-manager` asks for.
    """
    return len(set(getattr(model.hf_text_config, "layer_types", None) or [""]))


def check_engine(settings: SelfSpecConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse engines that selfspec does not support, each with one sentence."""
    if model.runner_type != "generate":
        raise ConfigError(
            f"method selfspec drafts text, but runner is {model.runner_type!r}: remove the speculative config."
        )
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}: selfspec needs all layers in one stage, "
            "use tensor parallelism instead."
        )
    if draft_together(model, parallel) and settings.control.mode != "fixed":
        raise ConfigError(
            f"data_parallel_size > 1 with control.mode {settings.control.mode!r} would let the ranks of a mixture of "
            "experts choose different draft lengths: set control.mode to 'fixed', or start one engine per rank."
        )
    if one_scheduler_per_rank(parallel) and settings.control.mode == "adaptive" and settings.control.profile == "auto":
        raise ConfigError(
            "distributed_executor_backend 'external_launcher' runs one scheduler per rank, and with control.profile "
            "'auto' each would measure times of its own and choose other draft lengths: set control.profile to the "
            "path of one profile, or control.mode to 'fixed'."
        )
    if model.enable_prompt_embeds:
        raise ConfigError(
            "enable_prompt_embeds does not work with method selfspec, which drafts from tokens: remove one of the two."
        )
    if model.is_encoder_decoder:
        raise ConfigError("method selfspec does not support encoder-decoder models: remove the speculative config.")
    if model.is_hybrid or model.is_attention_free:
        raise ConfigError(
            "method selfspec does not support state-space or hybrid layers, whose state cannot be rolled back: "
            "remove the speculative config."
        )
    if settings.drafter.experts not in (None, "native") and not model.is_moe:
        raise ConfigError(
            f"drafter.experts is {settings.drafter.experts!r}, but this model is no mixture of experts: leave it out."
        )
    settings.drafter.layers(model.get_total_num_hidden_layers())
    check_exit_head(settings.drafter, model)


def check_exit_head(drafter: DrafterConfig, model: ModelConfig) -> None:
    """Refuse a trained exit head that was made for another drafter or another model."""
    if drafter.exit_head is None:
        return
    head = exit_head.read_info(drafter.exit_head)
    if drafter.exit_layer != head.exit_layer or drafter.skip_layers:
        raise ConfigError(
            f"drafter.exit_head {drafter.exit_head!r} was trained behind {head.exit_layer} layers, none skipped: set "
            f"drafter.exit_layer to {head.exit_layer} and leave out drafter.skip_layers."
        )
    if model.get_hidden_size() != head.hidden_size:
        raise ConfigError(
            f"drafter.exit_head {drafter.exit_head!r} was trained for {head.model}, of hidden size {head.hidden_size}, "
            f"but this model's is {model.get_hidden_size()}: train one with vllm-selfspec train-exit."
        )
