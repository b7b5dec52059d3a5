"""Linear weights at the drafter's precision on NVIDIA GPUs, through vLLM's own kernel classes.

int4: W4A16, symmetric, groups of 64 inputs (32 where 64 does not divide), Machete, Marlin or Triton.
int8: W8A8, per output channel and per token, CUTLASS or Triton.
fp8: W8A8, per output channel and per token, CUTLASS or PyTorch; before capability 8.9 weight-only, Marlin.

vLLM picks the kernel for the device. Experts of a mixture are multiplied with by its function for fused experts: int4
(groups of 64) by CUDA up to six rows an expert, else by Triton, int8 and fp8 by Triton.

For linear layers it expects a layer that holds a checkpoint's tensors, as the compressed-tensors
schemes build it, and packs them for itself; that layer is built here from the full weight instead of from a file.

Not run on a GPU yet: tested on CPU with stand-in kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from vllm_selfspec.config import ConfigError, Precision
from vllm_selfspec.drafter.quantize import QuantizedExperts, QuantizedLinear, better_of
from vllm_selfspec.plugin import older_than

INT4_GROUPS = (64, 32)
EXPERTS_INT4_GROUP = 64
"""With 32 vLLM's CUDA kernel would meet widths of which it takes no block (three groups, as in 96)."""

_INT4_BIAS = 8
_FP8_MAX = 448.0
_CHUNK_ELEMENTS = 1 << 23
"""Elements quantized at a time: some 32 bytes of memory each, which a refresh needs beside a full KV cache."""


def _capability() -> int | None:
    """Compute capability times ten (90 for Hopper) of an NVIDIA GPU, None on any other platform."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    capability = current_platform.get_device_capability()
    return None if capability is None else int(capability.to_int())


def usable_cuda_precisions() -> list[str]:
    """Precisions for which vLLM has a kernel on this GPU, `native` first."""
    capability = _capability()
    usable = ["native"]
    if capability is None or capability < 75:
        return usable
    try:
        _int4_kernel_class(4096, 4096, INT4_GROUPS[0], torch.bfloat16)
        usable.append("int4")
    except ValueError:
        pass
    if capability < 100:  # vLLM has no int8 tensor-core kernels for Blackwell
        usable.append("int8")
    return [*usable, "fp8"]


def usable_experts_precisions() -> list[str]:
    """Precisions at which vLLM's function for fused experts multiplies with weights on this GPU."""
    capability = _capability() or 0
    usable = ["int4"] if capability >= 80 else []
    if 80 <= capability < 100:
        usable.append("int8")
    return [*usable, "fp8"] if capability >= 89 else usable


def default_cuda_precision() -> Precision:
    """int4 from capability 8.0 on: small batches, for which alone drafting pays, wait for weights to be read.

    With fp8 a draft costs at least half of what a step of a half-precision model costs, so that at 98 % acceptance no
    draft length gains more than 1.67x; int4 reads half of that. Where vLLM has no int4 kernel: fp8 from 8.9 on.
    """
    capability = _capability()
    if capability is None or capability < 80:
        return "native"
    if "int4" in usable_cuda_precisions():
        return "int4"
    return "fp8" if capability >= 89 else "native"


class CudaLinear(QuantizedLinear):
    """One weight matrix [N, K] in the format of the vLLM kernel that multiplies it.

    Raises:
        ConfigError: if no kernel takes the shape or the device.
    """

    def __init__(self, weight: torch.Tensor, precision: Precision) -> None:
        _check_shape(weight, precision)
        self._precision = precision
        # These kernels take half-precision activations only; a float32 model's are rounded on the way in.
        self._act_dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        self._rows = weight.shape[0]
        try:
            self._kernel = _kernel(weight, precision, self._act_dtype)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"drafter precision {precision} has no kernel for a weight of {weight.shape[0]} x {weight.shape[1]} on "
                "this GPU: set drafter.weights and drafter.lm_head to another precision or 'native' "
                f"(vLLM says: {reason})"
            ) from None
        self._layer = self._processed(self._kernel, weight)

    @torch.no_grad()
    def _processed(self, kernel: Any, weight: torch.Tensor) -> nn.Module:
        """A layer that holds `weight`, quantized and packed by `kernel`."""
        layer = _checkpoint_layer(weight, self._precision, self._act_dtype)
        kernel.process_weights_after_loading(layer)
        return layer

    @torch.no_grad()
    def refresh(self, weight: torch.Tensor) -> None:
        # The kernel keeps workspaces of its own beside the layer's tensors: only a copy of it sees the new layer.
        fresh = _tensors(self._processed(copy.copy(self._kernel), weight))
        for name, old in _tensors(self._layer).items():
            new = fresh.get(name)
            if new is None or new.shape != old.shape or new.dtype != old.dtype:
                now = "nothing" if new is None else f"{new.dtype} {list(new.shape)}"
                raise RuntimeError(
                    f"{type(self._kernel).__name__} packed {name} as {old.dtype} {list(old.shape)} before and as {now} "
                    "now: its buffers cannot be refreshed in place, so choose another drafter precision."
                )
            old.copy_(new)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self._act_dtype)
        out = self._kernel.apply_weights(self._layer, rows, None).to(x.dtype)
        if bias is not None:  # not in the kernel: some want it permuted as they packed it, and this one is the target's
            out = out + bias
        return out.reshape(*x.shape[:-1], self._rows)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self._layer).values())


class CudaExperts(QuantizedExperts):
    """Experts [E, N, K] as `vllm.model_executor.layers.fused_moe.fused_experts` takes them.

    int4: uint8 [E, N, K / 2], the lower half of a byte first, scales [E, N, K / 64]; int8 and fp8: [E, N, K], scales
    [E, N, 1].
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, precision: Precision) -> None:
        from vllm.model_executor.layers.fused_moe import config

        self._precision = precision
        # Of a float32 model's activations the CUDA kernel would take none.
        self._act_dtype = gate_up.dtype if gate_up.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        self._weights = [self._quantized(weight) for weight in (gate_up, down)]
        (_, scale1), (_, scale2) = self._weights
        if precision == "int4":
            self._config = config.int4_w4a16_moe_quant_config(scale1, scale2, block_shape=[0, EXPERTS_INT4_GROUP])
        elif precision == "int8":
            self._config = config.int8_w8a8_moe_quant_config(scale1, scale2, None, None, per_act_token_quant=True)
        else:
            self._config = config.fp8_w8a8_moe_quant_config(
                scale1, scale2, per_act_token_quant=True, per_out_ch_quant=True
            )

    @torch.no_grad()
    def _quantized(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = weight.flatten(0, 1)
        if self._precision == "int4":
            packed, scale = quantize_int4(rows, EXPERTS_INT4_GROUP, self._act_dtype)
            packed = packed.view(torch.uint8)
        else:
            packed, scale = quantize_per_channel(rows, torch.int8 if self._precision == "int8" else torch.float8_e4m3fn)
        return packed.unflatten(0, weight.shape[:2]), scale.unflatten(0, weight.shape[:2])

    def refresh(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        for weight, tensors in zip((gate_up, down), self._weights, strict=True):
            for new, old in zip(self._quantized(weight), tensors, strict=True):
                old.copy_(new)

    def apply(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe import fused_experts

        (gate_up, _), (down, _) = self._weights
        out = fused_experts(
            x.to(self._act_dtype).contiguous(),
            gate_up,
            down,
            weights,
            ids,
            global_num_experts=-1 if expert_map is None else len(expert_map),
            expert_map=expert_map,
            quant_config=self._config,
        )
        return out.to(x.dtype)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensors in self._weights for tensor in tensors)


def quantize_int4(
    weight: torch.Tensor, group: int, scale_dtype: torch.dtype, fits: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int4 in groups of inputs, packed as a compressed-tensors checkpoint is.

    A value is (q - 8) * scale. The scale carries the sign that puts each group's largest magnitude at q = 0, so that
    all sixteen levels are used: on normal weights the squared error is a fifth below that of amax / 7. It is then
    fitted to all values of the group, by a regression of them on their q.

    Args:
        weight: [N, K].
        group: inputs per scale; divides K.
        scale_dtype: the activations' dtype.
        fits: regressions; one is kept where it lessens the squared error.

    Returns:
        [N, K / 8] int32 with eight values of one row each, lowest bits first, and scales [N, K / group].
    """
    packed, scales = [], []
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    for chunk in weight.split(max(1, _CHUNK_ELEMENTS // weight.shape[1])):
        values = chunk.float().reshape(chunk.shape[0], -1, group)
        extreme = values.gather(-1, values.abs().argmax(dim=-1, keepdim=True))
        best = _nearest(values, extreme / -_INT4_BIAS, scale_dtype)
        for _ in range(fits):
            levels = best[0]
            slope = (levels * values).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp_(min=1)
            best = better_of(_nearest(values, slope, scale_dtype), best)
        levels, scale, _ = best
        stored = levels.to(torch.int32) + _INT4_BIAS
        packed.append((stored.reshape(chunk.shape[0], -1, 8) << shifts).sum(dim=-1, dtype=torch.int32))
        scales.append(scale.squeeze(-1))
    return torch.cat(packed), torch.cat(scales)


def _nearest(values: torch.Tensor, scale: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Levels -8 to 7 of values [N, G, K / G] for scales [N, G, 1] as they are rounded, and squared errors [N, G, 1]."""
    scale, tiny = scale.to(scale_dtype), torch.finfo(scale_dtype).tiny
    scale = torch.where(scale.abs() < tiny, tiny, scale)
    levels = (values / scale.float()).round_().clamp_(-_INT4_BIAS, _INT4_BIAS - 1)
    return levels, scale, (levels * scale.float() - values).square_().sum(dim=-1, keepdim=True)


def quantize_per_channel(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric per output channel.

    Args:
        weight: [N, K].
        dtype: `torch.int8` or an fp8 format.

    Returns:
        [N, K] of `dtype`, and scales [N, 1] float32.
    """
    largest = 127.0 if dtype == torch.int8 else _FP8_MAX
    quantized, scales = [], []
    for chunk in weight.split(max(1, _CHUNK_ELEMENTS // weight.shape[1])):
        values = chunk.float()
        scale = values.abs().amax(dim=1, keepdim=True).clamp_(min=1e-8) / largest
        values = (values / scale).clamp_(-largest, largest)
        quantized.append((values.round_() if dtype == torch.int8 else values).to(dtype))
        scales.append(scale)
    return torch.cat(quantized), torch.cat(scales)


def _check_shape(weight: torch.Tensor, precision: Precision) -> None:
    rows, columns = weight.shape
    rows_of, columns_of = (8, INT4_GROUPS[-1]) if precision == "int4" else (16, 16)
    if rows % rows_of or columns % columns_of:
        raise ConfigError(
            f"drafter precision {precision} needs weights whose inputs are a multiple of {columns_of} and outputs of "
            f"{rows_of}, but one is {rows} x {columns}: set drafter.weights or drafter.lm_head to 'native'."
        )


def _int4_group(columns: int) -> int:
    return next(group for group in INT4_GROUPS if columns % group == 0)


def _int4_config(rows: int, columns: int, group: int, act_dtype: torch.dtype) -> Any:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    return MPLinearLayerConfig(
        full_weight_shape=(columns, rows),
        partition_weight_shape=(columns, rows),
        weight_type=scalar_types.uint4b8,
        act_type=act_dtype,
        group_size=group,
        zero_points=False,
        **({"has_g_idx": False} if older_than("0.30") else {}),
    )


def _int4_kernel_class(rows: int, columns: int, group: int, act_dtype: torch.dtype) -> Any:
    from vllm.model_executor.kernels import linear

    config = _int4_config(rows, columns, group, act_dtype)
    chosen = linear.choose_mp_linear_kernel(config)
    if not chosen.__name__.startswith("Humming"):
        return chosen
    # vLLM's choice on Hopper for what Machete does not take. It wants a layer of vLLM's own and keeps locks beside the
    # layer's tensors, which a refresh would not restore; Marlin, its next choice, does neither.
    takes, reason = linear.MarlinLinearKernel.can_implement(config)
    if not takes:
        raise ValueError(reason)
    return linear.MarlinLinearKernel


def _kernel(weight: torch.Tensor, precision: Precision, act_dtype: torch.dtype) -> Any:
    """vLLM's kernel for this weight on this device.

    Raises:
        ValueError: vLLM's, if it has none.
    """
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym

    rows, columns = weight.shape
    if precision == "int4":
        group = _int4_group(columns)
        return _int4_kernel_class(rows, columns, group, act_dtype)(
            _int4_config(rows, columns, group, act_dtype),
            w_q_param_name="weight_packed",
            w_s_param_name="weight_scale",
            w_zp_param_name="weight_zero_point",
            **({"w_gidx_param_name": "weight_g_idx"} if older_than("0.30") else {}),
        )
    if precision == "int8":
        return linear.init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="the selfspec drafter"
        )
    return linear.init_fp8_linear_kernel(
        activation_quant_key=kFp8DynamicTokenSym,
        weight_quant_key=kFp8StaticChannelSym,
        input_dtype=act_dtype,
        out_dtype=act_dtype,
        weight_shape=(rows, columns),
        module_name="the selfspec drafter",
    )


def _no_loader(*_: Any) -> None:
    raise AssertionError("the drafter's weights are made from the target's, never loaded")


def _checkpoint_layer(weight: torch.Tensor, precision: Precision, act_dtype: torch.dtype) -> nn.Module:
    """A layer as vLLM's compressed-tensors scheme of that precision has it when a checkpoint has been loaded.

    Source: `vllm/model_executor/layers/quantization/compressed_tensors/schemes/` (wNa16, w8a8_int8, w8a8_fp8).
    """
    from vllm.model_executor.parameter import (
        ChannelQuantScaleParameter,
        GroupQuantScaleParameter,
        ModelWeightParameter,
        PackedvLLMParameter,
    )

    rows, columns = weight.shape
    layer = nn.Module()
    layer.input_size_per_partition = columns
    layer.output_size_per_partition = rows
    layer.output_partition_sizes = layer.logical_widths = [rows]
    layer.params_dtype = layer.orig_dtype = act_dtype
    layer.weight_block_size = None
    if precision == "int4":
        packed, scale = quantize_int4(weight, _int4_group(columns), act_dtype)
        layer.weight_packed = PackedvLLMParameter(
            data=packed, input_dim=1, output_dim=0, packed_dim=1, packed_factor=8, weight_loader=_no_loader
        )
        layer.weight_scale = GroupQuantScaleParameter(data=scale, input_dim=1, output_dim=0, weight_loader=_no_loader)
        return layer
    quantized, scale = quantize_per_channel(weight, torch.int8 if precision == "int8" else torch.float8_e4m3fn)
    layer.input_scale = None
    layer.weight_scale = ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=_no_loader)
    if precision == "int8":
        layer.weight = ModelWeightParameter(data=quantized, input_dim=1, output_dim=0, weight_loader=_no_loader)
        layer.input_zero_point = layer.azp_adj = None
    else:  # the scheme hands fp8 kernels the transpose
        layer.weight = nn.Parameter(quantized.t(), requires_grad=False)
        layer.weight.input_dim, layer.weight.output_dim = 0, 1
        layer.weight_scale = nn.Parameter(layer.weight_scale.data, requires_grad=False)
    return layer


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a kernel left on the layer: parameters, buffers and plain attributes."""
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **plain}
