"""Experts of a mixture in the target: which of them can be quantized for a drafter, and where their weights are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from vllm_selfspec.config import Precision
from vllm_selfspec.drafter.quantize import QuantizedExperts, experts_precisions


def why_native(experts: Any, vllm_config: VllmConfig, precision: Precision) -> str:
    """Why the experts of a layer are drafted with as they are; empty where they can be quantized."""
    config, parallel = experts.moe_config, experts.moe_config.moe_parallel_config
    if type(experts) is not RoutedExperts or type(experts.quant_method) is not UnquantizedFusedMoEMethod:
        return "they are of a kind of their own or quantized already"
    if vllm_config.lora_config is not None:
        return "adapters may work on them"
    if parallel.dp_size > 1 or parallel.pcp_size > 1 or parallel.enable_eplb or parallel.is_sequence_parallel:
        return "they move or are shared between engines"
    plain = config.activation == MoEActivation.SILU and not config.has_bias
    if not plain or experts.apply_router_weight_on_input or experts.swiglu_limit is not None:
        return "they are no MLPs that gate with SiLU, without biases"
    if precision not in experts_precisions(vllm_config.device_config.device_type):
        return f"nothing multiplies with experts at {precision} here"
    if current_platform.is_cpu() and experts.quant_method.is_monolithic:  # before vLLM 0.32
        return "this vLLM chooses experts on CPU inside of its own kernel"
    if current_platform.is_cpu() and experts.expert_map is not None:
        return "they are spread over processes"
    hidden, width = (16, 8) if current_platform.is_cpu() else (64, 64) if precision == "int4" else (16, 16)
    if config.hidden_dim % hidden or config.intermediate_size_per_partition % width:
        return (
            f"they are {config.intermediate_size_per_partition} wide on each device and the model {config.hidden_dim}, "
            f"which must be multiples of {width} and {hidden}"
        )
    return ""


def is_experts(layer: nn.Module) -> bool:
    """True for a layer's experts, whose weights are two: see `quantize_experts`."""
    return isinstance(layer, RoutedExperts)


def weights_before_packing(layer: Any) -> tuple[torch.Tensor, ...]:
    """The weights of a layer that has just been loaded."""
    return (layer.w13_weight, layer.w2_weight) if is_experts(layer) else (layer.weight,)


def full_weights(layer: Any) -> tuple[torch.Tensor, ...]:
    """The weights of a layer as they were loaded, or none where vLLM has packed them for its kernel."""
    weights = weights_before_packing(layer)
    if not is_experts(layer):
        return weights if weights[0].numel() else ()
    backend = getattr(layer.quant_method, "unquantized_backend", None)
    return weights if backend is not None and backend.name in ("TRITON", "BATCHED_TRITON") else ()


class DrafterExpertsMethod(FusedMoEMethodBase):
    """Stands where the experts' `quant_method` stands; applies the drafter's experts instead of the layer's own."""

    def __init__(self, config: Any, state: QuantizedExperts) -> None:
        super().__init__(config)
        self.state = state

    def create_weights(self, *_: Any, **__: Any) -> None:
        raise AssertionError("the drafter's experts are made from the target's")

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        return self.state.apply(x, topk_weights, topk_ids, layer.expert_map)
