"""The CUDA parts of the drafter, run on CPU with stand-ins for what only a GPU has: kernels, graphs, runner state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor import parameter
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.parameter import BasevLLMParameter, permute_param_layout_

from vllm_selfspec.config import ConfigError
from vllm_selfspec.drafter import quantize_cuda
from vllm_selfspec.drafter.quantize_cuda import CudaLinear, default_cuda_precision, quantize_int4, usable_precisions


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
        packed, scale, _ = self._get_weight_params(layer)  # [K / 8, N], [K / group, N]
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


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's choosers hand out the stand-ins above; parameters need no tensor-parallel group."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)

    def choose(config: Any, compute_capability: int | None = None) -> type[PlainInt4Kernel]:
        possible, reason = PlainInt4Kernel.can_implement(config)
        if not possible:
            raise ValueError(f"no kernel:\n {reason}")
        return PlainInt4Kernel

    def int8(is_channelwise: bool, is_static_input_scheme: bool, input_symmetric: bool, module_name: str) -> Any:
        assert is_channelwise and not is_static_input_scheme and input_symmetric
        return PlainScaledKernel(transposed=False)

    monkeypatch.setattr(linear, "choose_mp_linear_kernel", choose)
    monkeypatch.setattr(linear, "init_int8_linear_kernel", int8)
    monkeypatch.setattr(linear, "init_fp8_linear_kernel", lambda **_: PlainScaledKernel(transposed=True))
    yield


ERROR = {"int4": 0.13, "int8": 0.012, "fp8": 0.04}
"""Largest relative error of a product with normal weights: half a quantization step, with room for bf16 rounding."""


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.float() - reference.float()).norm() / reference.float().norm())


@pytest.mark.parametrize("precision", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_product_is_the_dense_one_within_quantization_error(kernels: None, precision: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x, bias = torch.randn(48, 256).to(dtype), torch.randn(2, 3, 256).to(dtype), torch.randn(48).to(dtype)
    state = CudaLinear(weight, precision)
    out = state.apply(x, bias)
    assert out.shape == (2, 3, 48) and out.dtype == dtype
    dense = x.float() @ weight.float().t()
    error = relative_error(out - bias, dense)
    assert 1e-4 < error < ERROR[precision]  # an exact product would mean that nothing was quantized
    assert torch.allclose((out - state.apply(x, None)).float(), bias.float().expand(2, 3, 48), atol=0.2)
    bits = 4 if precision == "int4" else 8
    assert weight.numel() * bits / 8 < state.nbytes < weight.numel() * bits / 8 * 1.3


@pytest.mark.parametrize("precision", ["int4", "int8", "fp8"])
def test_refresh_keeps_every_address_and_changes_the_result(kernels: None, precision: Any) -> None:
    torch.manual_seed(1)
    before, after, x = torch.randn(32, 128), torch.randn(32, 128) * 3, torch.randn(4, 128)
    state = CudaLinear(before, precision)
    addresses = {name: tensor.data_ptr() for name, tensor in quantize_cuda._tensors(state._layer).items()}
    workspace = getattr(state._kernel, "workspace", None)
    with torch.inference_mode():  # as inside propose()
        state.refresh(after)
    assert addresses == {name: tensor.data_ptr() for name, tensor in quantize_cuda._tensors(state._layer).items()}
    assert getattr(state._kernel, "workspace", None) is workspace
    assert relative_error(state.apply(x, None), x @ after.t()) < ERROR[precision]
    assert torch.equal(state.apply(x, None), CudaLinear(after, precision).apply(x, None))


def test_refresh_refuses_buffers_of_another_shape(kernels: None) -> None:
    state = CudaLinear(torch.randn(32, 128), "int4")
    with pytest.raises(RuntimeError, match="cannot be refreshed in place"):
        state.refresh(torch.randn(32, 256))


@pytest.mark.parametrize(
    ("precision", "shape"), [("int4", (32, 48)), ("int4", (20, 128)), ("int8", (24, 128)), ("fp8", (32, 40))]
)
def test_odd_shapes_are_refused_in_one_sentence(kernels: None, precision: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"{shape[0]} x {shape[1]}") as caught:
        CudaLinear(torch.randn(shape), precision)
    assert "\n" not in str(caught.value) and "drafter" in str(caught.value)


def test_a_missing_kernel_is_a_config_error(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainInt4Kernel, "can_implement", classmethod(lambda cls, c: (False, "no such\n device")))
    with pytest.raises(ConfigError, match="to another precision or 'native'") as caught:
        CudaLinear(torch.randn(32, 128), "int4")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("columns", "group"), [(256, 128), (192, 64), (96, 32)])
def test_int4_uses_the_largest_group_that_divides(kernels: None, columns: int, group: int) -> None:
    state = CudaLinear(torch.randn(16, columns), "int4")
    assert state._kernel.config.group_size == group
    assert state._layer.weight_scale.shape == (columns // group, 16)


def test_int4_reaches_the_extreme_of_every_group_and_zero_groups_stay_zero() -> None:
    weight = torch.randn(8, 128)
    weight[3] = 0
    packed, scale = quantize_int4(weight, 64, torch.bfloat16)
    levels = ((packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).reshape(8, 2, 64)
    values = (levels - 8) * scale.float().unsqueeze(-1)
    grouped = weight.reshape(8, 2, 64)
    place = grouped.abs().argmax(dim=-1, keepdim=True)
    assert torch.allclose(values.gather(-1, place), grouped.gather(-1, place), rtol=0.01)
    assert values[3].abs().max() < 1e-30
    assert (values - grouped).abs().max() <= scale.float().abs().max()


def test_int4_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 128)
    whole = quantize_int4(weight, 128, torch.bfloat16)
    monkeypatch.setattr(quantize_cuda, "_CHUNK_ELEMENTS", 7 * 128)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_int4(weight, 128, torch.bfloat16), strict=True))


@pytest.mark.parametrize(
    ("capability", "default", "usable"),
    [
        (None, "native", {"native"}),
        (70, "native", {"native"}),
        (75, "native", {"native", "int4", "int8", "fp8"}),
        (80, "int4", {"native", "int4", "int8", "fp8"}),
        (89, "fp8", {"native", "int4", "int8", "fp8"}),
        (90, "fp8", {"native", "int4", "int8", "fp8"}),
        (100, "fp8", {"native", "int4", "fp8"}),
    ],
)
def test_precisions_by_compute_capability(
    kernels: None, monkeypatch: pytest.MonkeyPatch, capability: int | None, default: str, usable: set[str]
) -> None:
    monkeypatch.setattr(quantize_cuda, "_capability", lambda: capability)
    assert default_cuda_precision() == default
    assert set(usable_precisions()) == usable


def test_this_machine_has_no_cuda_precision() -> None:
    assert quantize_cuda._capability() is None and usable_precisions() == ["native"]


def test_the_checkpoint_layer_is_what_vllms_own_kernels_take(kernels: None) -> None:
    """The real Triton W4A16 kernel's repacking, which is plain PyTorch, reads the layer as it was meant."""
    from vllm.model_executor.kernels.linear.mixed_precision.triton_w4a16 import TritonW4A16LinearKernel

    torch.manual_seed(2)
    weight = torch.randn(16, 64).to(torch.bfloat16)
    layer = quantize_cuda._checkpoint_layer(weight, "int4", torch.bfloat16)
    kernel = TritonW4A16LinearKernel.__new__(TritonW4A16LinearKernel)
    kernel.config = quantize_cuda._int4_config(16, 64, 64, torch.bfloat16)
    kernel.w_q_name, kernel.w_s_name, kernel.w_zp_name = "weight_packed", "weight_scale", "weight_zero_point"
    kernel.process_weights_after_loading(layer)
    assert layer.weight_packed.shape == (64, 2) and layer.weight_scale.shape == (1, 16)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = (((layer.weight_packed.unsqueeze(-1) >> shifts) & 15).reshape(64, 16) - 8) * layer.weight_scale.float()
    assert relative_error(values.t(), weight) < 0.13
