"""Where a quantized drafter gets its weights, and how it follows them when they change.

A `WeightTap` belongs to one drafter. It holds one `QuantizedLinear` per target layer that the drafter uses at reduced
precision. On CPU vLLM packs a layer's weight for its own kernel and drops the original inside
`process_weights_after_loading`, so the tap quantizes right before that, on the first load and on every reload. Where
the weight stays on the layer, the tap reads it from there and refreshes lazily, before the next proposal.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_selfspec.config import ConfigError, Precision
from vllm_selfspec.drafter.quantize import QuantizedLinear, quantize

Plan = Callable[[nn.Module], Precision]
"""The precision at which the drafter uses a linear layer or LM head of the target."""


class WeightTap:
    """Quantized copies of the target's weights, kept as fresh as the target's.

    Attributes:
        vllm_config: the engine that this drafter belongs to.
        refreshes: layers quantized again after the first time.
    """

    _living: weakref.WeakSet[WeightTap] = weakref.WeakSet()

    def __init__(self, vllm_config: Any, plan: Plan) -> None:
        self.vllm_config = vllm_config
        self.refreshes = 0
        self._plan = plan
        self._states: weakref.WeakKeyDictionary[nn.Module, QuantizedLinear] = weakref.WeakKeyDictionary()
        self._stale: weakref.WeakSet[nn.Module] = weakref.WeakSet()
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

    def capture(self, layer: nn.Module) -> None:
        """Quantize a layer whose full weight exists right now, at the precision that the plan gives it."""
        if layer in self._states or self._plan(layer) != "native":
            self._capture(layer, self._plan(layer))

    def _capture(self, layer: nn.Module, precision: Precision) -> None:
        weight = layer.weight
        if weight.is_meta or weight.ndim != 2:
            return
        state = self._states.get(layer)
        if state is None:
            self._states[layer] = quantize(weight.detach(), precision)
        else:
            state.refresh(weight.detach())
            self.refreshes += 1
        self._stale.discard(layer)

    def state(self, layer: nn.Module, precision: Precision) -> QuantizedLinear:
        """The quantized weight of `layer`, made now if the layer still holds its full weight."""
        if layer not in self._states:
            self._capture(layer, precision)
        if layer not in self._states:
            raise ConfigError(
                f"drafter: the full weight of {getattr(layer, 'prefix', type(layer).__name__)} is not available to "
                "quantize: set drafter.weights and drafter.lm_head to 'native'."
            )
        return self._states[layer]

    def mark_stale(self) -> None:
        """The target's weights changed; layers that still hold theirs are quantized again before the next proposal."""
        self._stale.update(self._states.keys())

    def refresh(self) -> None:
        """Quantize the stale layers again."""
        for layer in list(self._stale):
            if layer.weight.numel():
                self.capture(layer)
        self._stale.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized weights."""
        return sum(state.nbytes for state in self._states.values())


@torch.inference_mode()
def process_weights_after_loading(original: Callable[..., None], self: Any, layer: nn.Module) -> None:
    """Wraps vLLM's `process_weights_after_loading` of unquantized linear layers and embeddings."""
    tap = WeightTap.of(layer)
    if tap is not None and layer.weight.device.type == "cpu":
        tap.capture(layer)
    original(self, layer)
