"""Where a quantized drafter gets its weights, and how it follows them when they change.

A `WeightTap` belongs to one drafter. It holds one `QuantizedLinear` per target layer that the drafter uses at reduced
precision, one `QuantizedExperts` per layer of experts. On CPU, and experts on some GPUs, vLLM may pack a layer's weight
for its own kernel and drop the original inside `process_weights_after_loading`, so the tap quantizes it there, on the
first load and on every reload. Where the weight stays on the layer, the tap reads it from there and refreshes lazily,
before the next proposal.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.models import supports_multimodal
from vllm.platforms import current_platform

from vllm_selfspec.config import ConfigError, Precision
from vllm_selfspec.drafter.experts import full_weights, is_experts, weights_before_packing
from vllm_selfspec.drafter.quantize import quantize, quantize_experts

IDLE_SECONDS = 0.1
"""A gap of this length between two proposals lets the tap look for weights that changed behind vLLM's back."""

FINGERPRINT_TENSORS, FINGERPRINT_SAMPLES = 16, 32

logger = init_logger("vllm.selfspec")

Plan = Callable[[nn.Module], Precision]
"""The precision at which the drafter uses a linear layer, a layer's experts or the LM head of the target."""


class WeightTap:
    """Quantized copies of the target's weights, kept as fresh as the target's.

    Attributes:
        vllm_config: the engine that this drafter belongs to.
        plan: at which precision the drafter uses a layer.
        light: bool [1], which of the drafter's two views runs, where it has two; whoever runs it writes here.
        refreshed_layers: layers quantized again after the first time, in total.
        refresh_seconds: the time that following the target's weights took, in total.
    """

    _living: ClassVar[weakref.WeakSet[WeightTap]] = weakref.WeakSet()

    def __init__(self, vllm_config: Any, plan: Plan) -> None:
        self.vllm_config = vllm_config
        self.light = torch.zeros(1, dtype=torch.bool, device="cpu")
        self.refreshed_layers = 0
        self.refresh_seconds = 0.0
        self.plan = plan
        self._states: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self._stale: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._restores: list[Callable[[], object]] = []
        self._restore_due = False
        self._watched: list[torch.Tensor] = []
        self._fingerprint: torch.Tensor | None = None
        self._last_proposal = float("-inf")  # the first one looks, however soon it comes
        WeightTap._living.add(self)

    @classmethod
    def of(cls, layer: nn.Module) -> WeightTap | None:
        """The tap that uses `layer`, or, for a layer not seen yet, that of the engine being loaded."""
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        for tap in cls._living:
            if layer in tap._states or tap.vllm_config is config:
                return tap
        return None

    def capture(self, layer: nn.Module, *weights: torch.Tensor, precision: Precision | None = None) -> None:
        """Quantize the full weights of a layer, at first at `precision`, or what the plan gives it.

        Args:
            weights: [N, K], or two of experts as `quantize_experts` takes them.
        """
        state = self._states.get(layer)
        precision = precision or self.plan(layer)
        kind: Callable[..., Any] = quantize_experts if is_experts(layer) else quantize
        fits = [weight.ndim for weight in weights] == ([3, 3] if is_experts(layer) else [2])
        if not fits or weights[0].is_meta or (state is None and precision == "native"):
            return
        weights = tuple(weight.detach() for weight in weights)
        if state is None:
            self._states[layer] = kind(*weights, precision, self.light)
        else:
            _wait_for_the_device()  # else its work of before would be counted, and that of the refresh would not
            start = time.perf_counter()
            state.refresh(*weights)
            _wait_for_the_device()
            self.refresh_seconds += time.perf_counter() - start
            self.refreshed_layers += 1
        self._stale.discard(layer)

    def state(self, layer: nn.Module, precision: Precision | None = None) -> Any:
        """What `layer` is quantized to, made now if the layer still holds its full weights.

        Args:
            precision: of a layer that the plan does not know; None: the plan's.

        Returns:
            `QuantizedExperts` of a layer of experts, else `QuantizedLinear`.
        """
        if layer not in self._states:
            self.capture(layer, *full_weights(layer), precision=precision)
        if layer not in self._states:
            raise ConfigError(
                f"drafter: the full weight of {getattr(layer, 'prefix', type(layer).__name__)} is not available to "
                "quantize: set drafter.weights, drafter.lm_head and drafter.experts to 'native'."
            )
        return self._states[layer]

    def use_only(self, layers: list[nn.Module]) -> None:
        """Forget what was captured of other layers (a vision tower's, say), now and for good."""
        self._states = weakref.WeakKeyDictionary({layer: self._states[layer] for layer in layers})
        self.plan = lambda layer: "native"

    def watch(self, model: nn.Module) -> None:
        """Notice every `model.load_weights` of the target from now on, and watch a few of its tensors.

        Called once the drafter is made of the target's present weights.
        """
        load_weights = model.load_weights

        @functools.wraps(load_weights)
        def watched(*args: Any, **kwargs: Any) -> Any:
            # Marked before, not after: a layerwise load quantizes each layer as soon as it is complete.
            self.mark_stale()
            return load_weights(*args, **kwargs)

        model.load_weights = watched
        self._watched = self._tensors_to_watch(language_model(model))
        # The drafter was just made of these weights, so a write before the first proposal is noticed too.
        self._fingerprint = self._read_fingerprint()
        self._stale.clear()
        self._restore_due = False

    def _tensors_to_watch(self, model: nn.Module) -> list[torch.Tensor]:
        """Some of each kind, at different depths, those that the drafter quantizes first.

        A merged adapter changes the linear layers alone, and of these perhaps one kind.
        """
        quantized = {id(weight) for layer in self._states for weight in full_weights(layer)}
        kinds: dict[str, list[torch.Tensor]] = {}
        for name, tensor in model.named_parameters():
            if tensor.numel() >= FINGERPRINT_SAMPLES and tensor.is_floating_point():
                kinds.setdefault(".".join(name.split(".")[-2:]), []).append(tensor)
        first = sorted(kinds.values(), key=lambda tensors: id(tensors[0]) not in quantized)[:FINGERPRINT_TENSORS]
        counts = [(FINGERPRINT_TENSORS - place - 1) // len(first) + 1 for place in range(len(first))]
        return [
            tensors[len(tensors) * (2 * number + 1) // (2 * count)]
            for tensors, most in zip(first, counts, strict=True)
            for count in (min(most, len(tensors)),)
            for number in range(count)
        ]

    def mark_stale(self) -> None:
        """The target's weights changed; layers that still hold theirs are quantized again before the next proposal."""
        self._stale.update(self._states)
        self._restore_due = True

    def restore_too(self, restore: Callable[[], object]) -> None:
        """Call `restore` at every refresh: an update changes more than the weights that the tap knows."""
        self._restores.append(restore)

    def refresh(self) -> int:
        """Quantize the stale layers again; returns how many."""
        self._look_for_changes()
        if self._restore_due:
            start = time.perf_counter()
            for restore in self._restores:
                restore()
            self.refresh_seconds += time.perf_counter() - start
            self._restore_due = False
        if not self._stale:
            return 0
        layers = [layer for layer in self._stale if full_weights(layer)]
        for layer in layers:
            self.capture(layer, *full_weights(layer))
        self._stale.clear()
        self._fingerprint = self._read_fingerprint()
        logger.info("selfspec drafter refreshed: %d layers, %.2f s in all so far.", len(layers), self.refresh_seconds)
        return len(layers)

    def _look_for_changes(self) -> None:
        """After a pause, compare a few entries of the target's tensors with what they were."""
        now = time.monotonic()
        idle, self._last_proposal = now - self._last_proposal > IDLE_SECONDS, now
        if not idle or not self._watched or not self._states:
            return
        fingerprint = self._read_fingerprint()
        if self._fingerprint is not None and not torch.equal(fingerprint, self._fingerprint):
            self.mark_stale()
        self._fingerprint = fingerprint

    def _read_fingerprint(self) -> torch.Tensor:
        """[n] float32: evenly spaced entries of the watched tensors."""
        entries = [
            t.detach().flatten()[:: t.numel() // FINGERPRINT_SAMPLES][:FINGERPRINT_SAMPLES] for t in self._watched
        ]
        return torch.cat([e.float() for e in entries]) if entries else torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized weights."""
        return sum(state.nbytes for state in self._states.values())


def language_model(target: nn.Module) -> nn.Module:
    """The text part of a target, the target itself where that is all there is."""
    return target.get_language_model() if supports_multimodal(target) else target


def _wait_for_the_device() -> None:
    if not current_platform.is_cpu():
        torch.accelerator.synchronize()


@torch.inference_mode()
def process_weights_after_loading(original: Callable[..., None], self: Any, layer: nn.Module) -> None:
    """Wraps vLLM's `process_weights_after_loading` of unquantized linear layers, embeddings and experts.

    Some trainers fill layers and process them past `model.load_weights`. Everything is marked, not this layer alone:
    vLLM processes an embedding, but not the LM head that is tied to it.
    """
    tap = WeightTap.of(layer)
    weights = tuple(weight.detach() for weight in weights_before_packing(layer))
    original(self, layer)
    if tap is not None:
        tap.mark_stale()
        if not full_weights(layer):
            tap.capture(layer, *weights)


class RefreshCost(NamedTuple):
    """What following the target's weights has cost: layers quantized again, and the seconds that all of it took."""

    layers: int
    seconds: float


def refresh_cost(vllm_config: Any) -> RefreshCost:
    """The cost so far, of all drafters of one engine in this process."""
    taps = taps_of(vllm_config)
    return RefreshCost(sum(tap.refreshed_layers for tap in taps), sum(tap.refresh_seconds for tap in taps))


def taps_of(vllm_config: Any) -> list[WeightTap]:
    """The taps of one engine's drafters."""
    return [tap for tap in WeightTap._living if tap.vllm_config is vllm_config]


def update_ends(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps what ends an update, the worker's `finish_weight_update` and its like: the weights are others now."""
    try:
        return original(self, *args, **kwargs)
    finally:
        for tap in taps_of(self.vllm_config):
            tap.mark_stale()


def supports_draft_weight_updates(original: Callable[[Any], bool], self: Any) -> bool:
    """The worker's answer to a trainer that would send a draft model's weights, too."""
    return not hasattr(self.speculative_config, "selfspec") and original(self)


def refuse_draft_weights(original: Callable[[Any], None], self: Any) -> None:
    """The worker's `_set_draft_weight_update_target`, which `start_draft_weight_update` calls before it touches any."""
    if hasattr(self.speculative_config, "selfspec"):
        raise ConfigError(
            "start_draft_weight_update: method selfspec has no draft weights of its own; update the target's alone, "
            "the drafter follows them."
        )
    original(self)


def sample_tokens(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps the worker's `sample_tokens`: what refreshes have cost so far travels to the scheduler with its result."""
    output = original(self, *args, **kwargs)
    cost = refresh_cost(self.vllm_config)
    if cost.layers:
        # Asynchronous scheduling wraps the result, under one name on runner V1 and another on V2.
        inner = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", output)
        if inner is not None:
            inner.selfspec_refresh_cost = cost
    return output


def selfspec_refresh(self: Any) -> dict[str, float]:
    """Worker method, for `collective_rpc("selfspec_refresh")`: refresh the drafter now.

    Returns:
        `layers` refreshed by this call, `total_layers` and `total_seconds` of all refreshes so far, and the `bytes` of
        the drafter's own weights.
    """
    refreshed = 0
    taps = taps_of(self.vllm_config)
    with torch.inference_mode():
        for tap in taps:
            tap.mark_stale()
            refreshed += tap.refresh()
    cost = refresh_cost(self.vllm_config)
    return {
        "layers": refreshed,
        "total_layers": cost.layers,
        "total_seconds": cost.seconds,
        "bytes": sum(tap.nbytes for tap in taps),
    }
