"""`control.profile: auto`: times the real engine at start-up, once per model, machine, drafter and versions.

The engine core runs a few synthetic requests of random tokens through its own scheduler, model and sampler, with draft
lengths dictated step by step, so the times hold everything that a step holds. Different steps in turn separate the
three times that the cost model needs. On CPU a step that neither verifies nor drafts takes T_T, one that only verifies
γ takes T_V(γ), one that only drafts γ takes T_T + γ·T_D. On a device that works by itself the work of one step may be
in the duration of a neighbour, so several steps of a kind follow each other: plain ones, ones that draft as many as
they may which are not verified, taking T_T + γ·T_D, and, for each γ, ones that draft γ and verify γ.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest

from vllm_selfspec import __version__
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.control.cost_model import Component, CostModel, Point, ProfileIdentity, check_profile
from vllm_selfspec.control.policy import StepObservation
from vllm_selfspec.drafter.cpu_kernels import library_in_use
from vllm_selfspec.models import cache_dir
from vllm_selfspec.provenance import cpu_fact, huge_page_setting
from vllm_selfspec.scheduler import Dictate

logger = init_logger("vllm.selfspec")

BUDGET_SECONDS = {"cpu": 60.0}
DEFAULT_BUDGET_SECONDS = 20.0
REPETITIONS, ROUNDS = 2, 4
SHORT_CONTEXT, LONG_CONTEXT = 32, 4096


def core_init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Wraps `EngineCore.__init__`: weights find their pages, and an adaptive engine its cost model, before requests."""
    original(self, *args, **kwargs)
    settings = getattr(self.vllm_config.speculative_config, "selfspec", None)
    if not isinstance(settings, SelfSpecConfig):
        return
    self.model_executor.collective_rpc("selfspec_use_huge_pages")  # before anything is timed
    if settings.control.mode == "adaptive":
        light_view = all(self.model_executor.collective_rpc("selfspec_light_view"))
        model = cost_model(self, settings, light_view)
        if model is None:
            logger.warning("selfspec could not time this engine (max_model_len too short?); it learns as it runs.")
        self.scheduler.start_controller(model, light_view)


def cost_model(core: Any, settings: SelfSpecConfig, light_view: bool) -> CostModel | None:
    """The cost model of this engine: the profile that was named, a cached one, or one measured now.

    None where requests of this engine are too short to be timed.

    Raises:
        ConfigError: the named profile cannot be read or belongs to another engine.
    """
    identity = profile_identity(core.vllm_config, settings)
    if settings.control.profile != "auto":
        try:
            named = CostModel.from_profile(settings.control.profile)
            check_profile(json.loads(Path(settings.control.profile).read_text())["meta"], identity)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"control.profile {settings.control.profile!r}: {error}") from error
        return named
    path = cache_path(identity, core.vllm_config)
    try:
        if path.exists():
            logger.info("selfspec uses the cached profile %s.", path)
            return CostModel.from_profile(path)
    except (OSError, ValueError) as error:
        logger.warning("selfspec cannot read its cached profile %s (%s) and measures again.", path, error)
    model = measure(core, settings, identity, light_view)
    if model is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder) / path.name
            model.save(partial)
            partial.replace(path)
        logger.info("selfspec saved its profile to %s.", path)
    except OSError as error:
        logger.warning("selfspec cannot keep its profile for the next start: %s", error)
    return model


def profile_identity(config: VllmConfig, settings: SelfSpecConfig) -> ProfileIdentity:
    """Everything on which measured times depend."""
    model, parallel = config.model_config, config.parallel_config
    if current_platform.is_cpu():
        hardware = f"{cpu_fact('model name')} x{torch.get_num_threads()}"
        if huge_pages := huge_page_setting():
            hardware += f", huge pages: {huge_pages}"
    else:
        hardware = f"{current_platform.get_device_name()} x{parallel.tensor_parallel_size}"
    eager = " eager" if model.enforce_eager else ""
    runner = " runner V2" if config.use_v2_model_runner else ""
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "vllm-selfspec": __version__}
    if library := library_in_use():
        versions["kernels"] = library
    return ProfileIdentity(
        model=f"{model.model} {model.compute_hash()[:12]} {model.dtype}{eager}{runner}",
        hardware=hardware,
        drafter=f"{settings.drafter.model_dump_json()} up to {settings.num_speculative_tokens}",
        versions=versions,
    )


def cache_path(identity: ProfileIdentity, config: VllmConfig) -> Path:
    """Where the measured profile of an engine is kept.

    A profile that is named is the user's choice. One that is found must not only be of this identity: its engine had
    the same batches to measure, the same cores and the same kind of graphs.
    """
    cores = [os.environ.get(name) for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")]
    details = (
        config.scheduler_config.max_num_seqs,
        config.parallel_config.tensor_parallel_size,
        config.lora_config is not None,
        config.cache_config.cache_dtype,
        str(config.compilation_config.mode),
        str(config.compilation_config.cudagraph_mode),
        cores if current_platform.is_cpu() else None,
    )
    key = hashlib.sha256(repr((identity, details)).encode()).hexdigest()[:16]
    return cache_dir() / "profiles" / f"{key}.json"


def measure(
    core: Any, settings: SelfSpecConfig, identity: ProfileIdentity, light_view: bool = False
) -> CostModel | None:
    """Time the engine for batch sizes 1, 2, 4, … and a few draft lengths, in rounds, as long as the budget lasts.

    Rounds, because a machine that others use is slow for a while: each batch size is measured at several moments. Every
    second round is of long contexts, which tell what a token of context costs.
    """
    budget = BUDGET_SECONDS.get(current_platform.device_type, DEFAULT_BUDGET_SECONDS)
    longest = settings.num_speculative_tokens
    lengths = sorted({1, (longest + 1) // 2, longest})
    start = time.perf_counter()
    runs: dict[tuple[int, bool], list[list[StepObservation]]] = defaultdict(list)
    took: dict[tuple[int, bool], float] = {}
    for number in range(ROUNDS):
        far = number % 2 == 1
        batch = 1
        while batch <= core.vllm_config.scheduler_config.max_num_seqs:
            began = time.perf_counter()
            # Not measured yet: more than half the batch took, and more than it took with little context.
            guess = 2.2 * took.get((batch // 2, far), 0.0) or 1.5 * took.get((batch, False), 0.0)
            if began - start + took.get((batch, far), guess) > budget:
                break
            made = run_batch(core, batch, lengths, far, light_view)
            if not made:
                break
            runs[batch, far].append(made)
            took[batch, far] = time.perf_counter() - began
            logger.info(
                "selfspec calibration: round %d, batch %d measured in %.1f s (budget %.0f s).",
                number + 1,
                batch,
                took[batch, far],
                budget,
            )
            batch *= 2
    points = [point for (batch, _), made in runs.items() for point in points_of(made, batch)]
    if not {"target", "draft"} <= {point.component for point in points}:
        return None
    meta = {
        "model": identity.model,
        "hardware": identity.hardware,
        "drafter": identity.drafter,
        "versions": identity.versions,
        "source": "measured at engine start-up",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return CostModel.fit(points, meta=meta)


def run_batch(
    core: Any, batch: int, lengths: Sequence[int], far: bool = False, light_view: bool = False
) -> list[StepObservation]:
    """The steps of one batch size, in order; leaves the engine without requests.

    Args:
        far: with as much context as this batch may have, up to `LONG_CONTEXT` tokens each. No steps where that is
            hardly more than without.
        light_view: time drafts of the light view, too.
    """
    # A plain step, one that drafts, one that only verifies what was drafted. What verifying takes does not depend on
    # the view, so one length of the light one is enough.
    main, light = (False, True) if light_view else (None, None)
    drafting = [Dictate(length, main) for length in lengths] + [Dictate(lengths[len(lengths) // 2], light)] * light_view
    plan = plan_for(drafting, REPETITIONS)
    needed = 2 + sum(step.num_draft_tokens * step.verified + 1 for step in plan)
    room = core.vllm_config.model_config.max_model_len
    prompt = min(SHORT_CONTEXT, max(1, room // 4))
    if far:
        free = core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() // batch
        slots = free * core.vllm_config.cache_config.block_size
        short, prompt = prompt, min(LONG_CONTEXT, room - needed, slots - needed - core.scheduler.num_lookahead_tokens)
        if prompt < 4 * short:
            return []
    with synthetic_requests(core, batch, prompt, min(needed, room - prompt), computed=far) as (step, observations):
        for wanted in [Dictate(0), *plan]:
            step(wanted)
    core.reset_prefix_cache()
    return observations


def plan_for(drafting: Sequence[Dictate], repetitions: int) -> list[Dictate]:
    """Steps from which `components_of` tells T_T, T_D and T_V(γ) apart, for each way of drafting."""
    plain = Dictate(0)
    if current_platform.is_cpu():
        return [step for wanted in drafting for step in (plain, wanted, plain)] * repetitions
    longest = max(drafting, key=lambda wanted: wanted.num_draft_tokens)
    kinds = [plain, replace(longest, verified=False), *drafting]
    return [kind for kind in kinds for _ in range(3 * repetitions)]


@contextmanager
def synthetic_requests(
    core: Any, batch: int, prompt_tokens: int, max_tokens: int, *, computed: bool = False
) -> Iterator[tuple[Callable[[Dictate], None], list[StepObservation]]]:
    """Requests of random tokens at temperature 1, whose draft lengths the caller dictates; aborted at the end.

    Args:
        computed: take all of each prompt but its last token as computed, whatever the KV cache holds there: a step's
            time does not depend on it. The caller resets the prefix cache.

    Yields:
        a function that runs one step of the engine, which drafts as it is told, and the list to which every step is
        appended.
    """
    vocabulary = core.vllm_config.model_config.get_vocab_size()
    dice = random.Random(batch)
    names = [f"selfspec-synthetic-{row}" for row in range(batch)]
    for name in names:
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=[dice.randrange(vocabulary) for _ in range(prompt_tokens)],
            mm_features=None,
            sampling_params=SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        core.add_request(*core.preprocess_add_request(request))
        if computed:
            # As after a transfer from another engine; the scheduler still allocates the blocks.
            core.scheduler.requests[name].num_computed_tokens = prompt_tokens - 1
    observations: list[StepObservation] = []
    with core.scheduler.dictated(observations) as dictate:

        def step(wanted: Dictate) -> None:
            dictate(wanted)
            core.post_step(core.step_fn()[1])

        yield step, observations
        core.abort_requests(names)
        while core.scheduler.has_requests():
            step(Dictate(0))


def points_of(runs: Sequence[Sequence[StepObservation]], batch: int) -> list[Point]:
    """Median times of the steps that decoded, or first computed, the whole batch and nothing else.

    Args:
        runs: the steps of each run, in order.
        batch: requests in each run.
    """
    seconds: dict[tuple[Component, int], list[float]] = defaultdict(list)
    prefill: dict[int, list[float]] = defaultdict(list)
    contexts: list[float] = []
    for run in runs:
        whole = [step for step in run if step.num_decode == batch]
        for step in whole:
            if step.prefill_tokens and step.num_verified == step.num_drafted == 0:
                prefill[step.prefill_tokens // batch + 1].append(step.seconds)
        decoding = [s for s in whole if not s.prefill_tokens and s.num_verified == int(s.num_verified)]
        contexts += [step.mean_context for step in decoding]
        for part, took in components_of(decoding).items():
            seconds[part] += took
    if ("target", 0) not in seconds:
        return []
    seq = max(1, round(statistics.fmean(contexts)))
    measured: list[tuple[Component, int, int, list[float]]] = [(c, seq, k, t) for (c, k), t in seconds.items()]
    measured += [("prefill", tokens, 0, t) for tokens, t in prefill.items()]
    medians = [(component, at, k, statistics.median(t), _error(t)) for component, at, k, t in measured]
    return [Point(component, batch, at, k, middle, error) for component, at, k, middle, error in medians if middle > 0]


def components_of(steps: Sequence[StepObservation]) -> dict[tuple[Component, int], list[float]]:
    """Seconds of each component at each γ, from decoding steps in order.

    A draft is what a step took beyond the plain one before it, a verification beside drafts what it took beyond the
    last drafts that were timed: what slows the machine for a while slows both.
    """
    seconds: dict[tuple[Component, int], list[float]] = defaultdict(list)
    plain: float | None = None
    draft: float | None = None
    for step in steps if current_platform.is_cpu() else steady(steps):
        verified, drafted = int(step.num_verified), step.num_drafted
        if verified and not drafted:
            seconds["verify", verified].append(step.seconds)
        elif verified:
            if draft is not None:
                seconds["verify", verified].append(step.seconds - drafted * draft)
        elif not drafted:
            plain = step.seconds
            seconds["target", 0].append(plain)
        elif plain is not None:
            draft = (step.seconds - plain) / drafted
            seconds["light" if step.light else "draft", drafted].append(draft)
    return seconds


def steady(steps: Sequence[StepObservation]) -> list[StepObservation]:
    """Those among steps of one kind, one before and two after them.

    Where the device works by itself, what passes between two results is the drafts of the step before and the forward
    pass of this one, or, where the host takes longer than the device, what it does meanwhile for this step or the next.
    """
    kinds = [(step.num_verified, step.num_drafted, step.light) for step in steps]
    return [steps[i] for i in range(1, len(steps) - 2) if len(set(kinds[i - 1 : i + 3])) == 1]


def _error(seconds: Sequence[float]) -> float:
    """Relative standard error of the median, from the median absolute deviation; never better than 2 %."""
    middle = statistics.median(seconds)
    deviation = 1.48 * statistics.median(abs(value - middle) for value in seconds)
    # With a handful of values the deviation itself is uncertain.
    chance = 1.25 * deviation / abs(middle) / len(seconds) ** 0.5 if middle else 1.0
    return round(max(0.02, 0.1 / len(seconds), min(1.0, chance)), 4)
