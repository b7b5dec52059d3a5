"""A tied LM head keeps its old weights through every layerwise weight update on CPU in vLLM 0.32.

Symptom: after `start_weight_update` / `update_weights` / `finish_weight_update`, or `reload_weights`, of a model with
tied embeddings, the logits are those of the new layers under the old LM head. All that is seen of it is the warning
"ParallelLMHead: Failed to load weights".
Cause: on CPU a linear layer computes from a packed copy of its weight (`layer.cpu_linear`, made by
`process_weights_after_loading`). The tied head has no tensor of its own in the checkpoint, so the layerwise reload
loads, packs and copies the embedding only: the head's `weight` is the embedding's and new, its pack is old.
Mend: after the reload, give a head that shares its weight with an embedding the embedding's pack, which was made from
the new weight. That costs nothing and frees the head's own. No other layer is touched, nor any without `cpu_linear`.
Goes when vLLM packs tied heads again itself, that is when `broken()` is False without the seam.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch


def repack(model: torch.nn.Module) -> int:
    """Let tied heads compute from the pack of the module that they share their weight with. Returns how many did not.

    `model.modules()` yields the embedding, which is loaded, before the head: of modules that share a weight the first
    one's pack is the fresh one.
    """
    first: dict[int, torch.nn.Module] = {}
    mended = 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.numel() or "cpu_linear" not in vars(module):
            continue
        owner = first.setdefault(id(weight), module)
        if owner is not module and module.cpu_linear is not owner.cpu_linear:
            module.cpu_linear = owner.cpu_linear
            mended += 1
    return mended


def broken() -> bool:
    """True when vLLM's layerwise reload leaves a tied head behind on this CPU; found out on two toy layers."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.reload import layerwise

    model = torch.nn.ModuleDict()
    method = UnquantizedEmbeddingMethod()
    for name in ("embed", "head"):
        layer = torch.nn.Module()
        layer.quant_method = method
        method.create_weights(layer, 32, [64], 32, 64, torch.float32)
        layer.weight.data.fill_(1.0)
        model[name] = layer
    method.tie_weights(model["head"], model["embed"])
    layerwise.record_metadata_for_reloading(model)
    for layer in model.values():
        method.process_weights_after_loading(layer)

    layerwise.initialize_layerwise_reload(model)
    parameter = model["embed"].weight
    parameter.weight_loader(parameter, torch.full((64, 32), 2.0))
    warns, layerwise.logger.disabled = layerwise.logger.disabled, True  # "Module: Failed to load weights" of this toy
    try:
        # No attention layer in this model reads the configuration.
        layerwise.finalize_layerwise_reload(model, types.SimpleNamespace(dtype=torch.float32))
    finally:
        layerwise.logger.disabled = warns

    logits = method.apply(model["head"], torch.ones(1, 32))
    return not torch.allclose(logits, torch.full((1, 64), 64.0))


def finalize(original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """vLLM's end of a layerwise reload, then `repack`."""
    original(model, *args, **kwargs)
    repack(model)
