"""Experts are not packed again when a mixture's weights are loaded again on CPU, in vLLM 0.29 to 0.33.

Symptom: after `reload_weights`, or `start_weight_update` and what follows it, of a mixture of experts, the model writes
other text than an engine that was started with the new weights. Nothing is said.
Cause: the kernel for experts on CPU reads weights in an order of its own, into which the kernel's
`process_weights_after_loading` puts them. `UnquantizedFusedMoEMethod._setup_kernel` calls it at the first load only,
and leaves later ones in the checkpoint's order.
Mend: call it after every load.
Goes when vLLM does, that is when `broken()` is False without the seam.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


def broken() -> bool:
    """True when vLLM leaves experts that are loaded again unpacked on this CPU; found out on a toy layer."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    packed: list[torch.nn.Module] = []
    kernel = SimpleNamespace(fused_experts=SimpleNamespace(process_weights_after_loading=packed.append))
    method = SimpleNamespace(unquantized_backend=UnquantizedMoeBackend.CPU, moe_kernel=kernel)
    layer = torch.nn.Module()
    layer.moe_config = None
    for name in ("w13_weight", "w2_weight"):
        layer.register_parameter(name, torch.nn.Parameter(torch.zeros(1, 32, 32), requires_grad=False))
    UnquantizedFusedMoEMethod._setup_kernel(method, layer, layer.w13_weight, layer.w2_weight)
    return not packed


def setup_kernel(original: Callable[..., None], self: Any, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """vLLM's `_setup_kernel`, which packs the experts at later loads, too."""
    again = self.moe_kernel is not None
    original(self, layer, *args, **kwargs)
    if again:
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)
