"""Stand-ins for vLLM's quantized CUDA kernels: the same interfaces, the products by dequantizing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.parameter import BasevLLMParameter, permute_param_layout_


class PlainInt4Kernel(MPLinearKernel):
    """W4A16 by dequantizing; like Marlin it repacks the checkpoint's layout, and keeps a workspace of its own."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        return c.act_type in (torch.float16, torch.bfloat16), "half precision only"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.workspace = torch.zeros(4)

        def transpose(x: torch.Tensor) -> torch.Tensor:
            assert isinstance(x, BasevLLMParameter)
            dims = {"packed_dim": 0} if hasattr(x, "packed_dim") else {}
            permute_param_layout_(x, input_dim=0, output_dim=1, **dims)
            x.data = x.data.contiguous()
            return x

        self._transform_param(layer, self.w_q_name, transpose)
        self._transform_param(layer, self.w_s_name, transpose)
        layer.w_zp = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert x.ndim == 2 and x.dtype == self.config.act_type and bias is None
        packed, scale, *_ = self._get_weight_params(layer)  # [K / 8, N], [K / group, N]
        values = (packed.unsqueeze(1) >> torch.arange(0, 32, 4, dtype=torch.int32)[:, None]) & 15
        values = values.reshape(-1, packed.shape[1]) - self.config.weight_type.bias
        weight = values * scale.float().repeat_interleave(self.config.group_size, dim=0)
        return (x.float() @ weight).to(x.dtype)


class PlainScaledKernel:
    """int8 or fp8 W8A8 by dequantizing, with vLLM's scaled-mm interface; the weight may come as [N, K] or [K, N]."""

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not self.transposed:  # int8 kernels take the checkpoint's layout and turn it
            replace_parameter(layer, "weight", nn.Parameter(layer.weight.t().data, requires_grad=False))
        scale = nn.Parameter(layer.weight_scale.data, requires_grad=False)
        replace_parameter(layer, "weight_scale", scale)

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert x.ndim == 2 and bias is None
        assert layer.weight.shape[0] == x.shape[1]
        return (x.float() @ (layer.weight.float() * layer.weight_scale.reshape(1, -1))).to(x.dtype)


def choose_int4(config: Any, compute_capability: int | None = None) -> type[PlainInt4Kernel]:
    """Stands in for `choose_mp_linear_kernel`."""
    possible, reason = PlainInt4Kernel.can_implement(config)
    if not possible:
        raise ValueError(f"no kernel:\n {reason}")
    return PlainInt4Kernel


def choose_int8(
    is_channelwise: bool, is_static_input_scheme: bool, input_symmetric: bool, module_name: str
) -> PlainScaledKernel:
    """Stands in for `init_int8_linear_kernel`."""
    assert is_channelwise and not is_static_input_scheme and input_symmetric
    return PlainScaledKernel(transposed=False)


def choose_fp8(**_: Any) -> PlainScaledKernel:
    """Stands in for `init_fp8_linear_kernel`."""
    return PlainScaledKernel(transposed=True)


CHOOSERS = {
    "choose_mp_linear_kernel": choose_int4,
    "init_int8_linear_kernel": choose_int8,
    "init_fp8_linear_kernel": choose_fp8,
}
"""By their names in `vllm.model_executor.kernels.linear`."""
