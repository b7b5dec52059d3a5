"""Weights at the drafter's precision: quantized once, applied many times, refreshed in place.

On CPU: int8 (W8A8, per output channel and per token), int4 (groups of the input dimension), and both, where the
number of rows decides. By the kernels of `quantize_rows.py`, or oneDNN's and ATen's on CPUs that these are not for.
On CUDA: vLLM's own kernel classes, see `quantize_cuda.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from vllm_selfspec.config import ConfigError, Precision
from vllm_selfspec.drafter.cpu_kernels import own_kernels

INT4_GROUP = 64

FEW_ROWS = 3
"""Up to so many rows the light view drafts where nobody chooses: there fewer bits gain most."""


class QuantizedLinear(ABC):
    """One weight matrix [N, K] at reduced precision.

    `refresh` writes into the existing buffers, whose addresses captured graphs hold.
    """

    @abstractmethod
    def refresh(self, weight: torch.Tensor) -> None:
        """Quantize `weight` [N, K] into the existing buffers."""

    @abstractmethod
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., K] times the weight's transpose, plus bias [N]; result [..., N] of x's dtype."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the quantized weight occupies."""

    @property
    def nbytes_read(self) -> int:
        """Bytes of it that a product reads."""
        return self.nbytes


class QuantizedExperts(ABC):
    """The experts of one layer at reduced precision, each an MLP that gates with SiLU.

    `refresh` writes into the existing buffers, whose addresses captured graphs hold.
    """

    @abstractmethod
    def refresh(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Quantize weights [E, 2 I, H] (of the gates first) and [E, H, I] into the existing buffers."""

    @abstractmethod
    def apply(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        """What the experts `ids` [T, k] make of rows x [T, H], each times its weight [T, k], added up: [T, H].

        Args:
            expert_map: [all experts] int32, which of E they are, -1 for those of other ranks; None: all are here.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the quantized weights occupy."""


def better_of(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """For each group what quantizes it better: of two tuples the one whose last tensor, an error, is smaller."""
    better = one[-1] < other[-1]
    return tuple(torch.where(better, a, b) for a, b in zip(one, other, strict=True))


def int4_groups(weight: torch.Tensor, dtype: torch.dtype, fits: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups of 64 inputs to four bits; a value is (q - 8) * scale + zero.

    Args:
        weight: [N, K], K a multiple of 64.
        dtype: of scales and zeros; q is chosen for them as they are rounded.
        fits: regressions of scale and zero on the values of a group; `csrc` makes as many.

    Returns:
        q as uint8 [N, G, 64], 0 to 15; scales and zeros [N, G, 2].
    """
    groups = weight.float().unflatten(1, (-1, INT4_GROUP))

    def nearest(scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale, zero = scale.clamp(min=1e-8).to(dtype), zero.to(dtype)
        q = ((groups - zero.float()) / scale.float()).round_().add_(8).clamp_(0, 15)
        error = ((q - 8) * scale.float() + zero.float() - groups).square_().sum(dim=-1, keepdim=True)
        return q, scale, zero, error

    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 15
    best = nearest(scale, low + 8 * scale)
    # Then fitted to all values of a group: a regression of them on their q.
    for _ in range(fits):
        q = best[0] - best[0].mean(dim=-1, keepdim=True)
        scale = (q * groups).sum(dim=-1, keepdim=True) / q.square().sum(dim=-1, keepdim=True).clamp_(min=1e-8)
        zero = (groups - (best[0] - 8) * scale).mean(dim=-1, keepdim=True)
        best = better_of(nearest(scale, zero), best)
    q, scale, zero, _ = best
    return q.to(torch.uint8), torch.cat((scale, zero), dim=-1)


class CpuInt8Linear(QuantizedLinear):
    """Symmetric int8 per output channel, activations quantized per token, oneDNN W8A8."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._dtype = weight.dtype
        self._scale = torch.empty(weight.shape[0], 1, dtype=torch.float32)
        self._handler = self._pack(weight)

    def _pack(self, weight: torch.Tensor):  # type: ignore[no-untyped-def]  # vLLM's handler class is untyped
        from vllm import _custom_ops as ops

        # vLLM's quantizer for the rows of an activation does the same to the rows of a weight.
        quantized, scale, _ = ops.onednn_scaled_int8_quant(weight.contiguous(), None, None, True)
        # oneDNN keeps a pointer to the scales: they live as long as the handler, and are overwritten by a refresh.
        self._scale.copy_(scale)
        self._nbytes = quantized.nbytes + self._scale.nbytes
        return ops.create_onednn_scaled_mm(quantized.t(), self._scale, self._dtype, True, False, 32)

    def refresh(self, weight: torch.Tensor) -> None:
        fresh = self._pack(weight)
        # Swap the pointers inside the tensors: compiled graphs read this one, and the old pack is freed with `fresh`.
        old, new = self._handler.handler_tensor, fresh.handler_tensor
        pointer = old.clone()
        old.copy_(new)
        new.copy_(pointer)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        from vllm import _custom_ops as ops

        rows = x.reshape(-1, x.shape[-1])
        quantized, scale, _ = ops.onednn_scaled_int8_quant(rows, None, None, True)
        out = torch.empty((rows.shape[0], self._handler.n), dtype=x.dtype)
        ops.onednn_scaled_mm(self._handler, quantized, out, scale, None, None, bias)
        return out.reshape(*x.shape[:-1], self._handler.n)

    @property
    def nbytes(self) -> int:
        return self._nbytes


class CpuInt4Linear(QuantizedLinear):
    """Asymmetric int4 in groups of 64 inputs, weight-only, ATen's packed CPU kernel."""

    def __init__(self, weight: torch.Tensor) -> None:
        rows, columns = weight.shape
        if columns % INT4_GROUP or rows % 16:
            raise ConfigError(
                f"drafter precision int4 needs weights whose inputs are a multiple of {INT4_GROUP} and outputs of 16, "
                f"but one is {rows} x {columns}: use int8."
            )
        self._packed, self._scale_and_zero = self._pack(weight)

    @staticmethod
    def _pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed weight and [K / group, N, 2] scales and zeros; a value is (q - 8) * scale + zero."""
        quantized, scale_and_zero = int4_groups(weight, weight.dtype)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.reshape(weight.shape).int(), 1)
        return packed, scale_and_zero.transpose(0, 1).contiguous()

    def refresh(self, weight: torch.Tensor) -> None:
        packed, scale_and_zero = self._pack(weight)
        self._packed.copy_(packed)
        self._scale_and_zero.copy_(scale_and_zero)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, INT4_GROUP, self._scale_and_zero)
        if bias is not None:
            out = out + bias
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + self._scale_and_zero.nbytes


def default_precision(device_type: str) -> Precision:
    """The cheapest precision that this platform's kernels support; both where either may be the better one."""
    if device_type == "cpu":
        from vllm import _custom_ops as ops

        if own_kernels():
            return "int4+int8"
        return "int8" if ops._supports_onednn else "native"
    from vllm_selfspec.drafter.quantize_cuda import default_cuda_precision

    return default_cuda_precision()


def usable_precisions(device_type: str) -> list[str]:
    """Precisions for which this platform has kernels, `native` first."""
    if device_type != "cpu":
        from vllm_selfspec.drafter.quantize_cuda import usable_cuda_precisions

        return usable_cuda_precisions()
    import vllm._custom_ops  # noqa: F401  # registers the kernels

    if own_kernels():
        return ["native", "int4", "int8", "int4+int8"]
    return ["native", "int4", *(["int8"] if hasattr(torch.ops._C, "create_onednn_scaled_mm_handler") else [])]


def experts_precisions(device_type: str) -> list[str]:
    """Precisions for which this platform has kernels that multiply with experts."""
    if device_type != "cpu":
        from vllm_selfspec.drafter.quantize_cuda import usable_experts_precisions

        return usable_experts_precisions()
    return ["int4", "int8", "int4+int8"] if own_kernels() else []


def choose_precision(field: str, asked: Precision | None, device_type: str) -> Precision:
    """The precision of `field`: the one asked for if there is a kernel, the platform's own when none is (None).

    Raises:
        ConfigError: names `field` and the precisions that work.
    """
    if asked is None:
        return default_precision(device_type)
    if asked == "native":
        return asked
    usable = usable_precisions(device_type)
    if asked not in usable:
        raise ConfigError(f"{field} is {asked!r}, which has no kernel here: use one of {', '.join(sorted(usable))}.")
    return asked


def quantize(weight: torch.Tensor, precision: Precision, light: torch.Tensor | None = None) -> QuantizedLinear:
    """Quantize a weight matrix.

    Args:
        weight: [N, K] in the model's dtype.
        precision: not `native`.
        light: bool [1], which view the products of an `int4+int8` weight are for; by default the main one.

    Raises:
        ConfigError: if the shape does not fit the kernel.
    """
    if weight.device.type != "cpu":
        from vllm_selfspec.drafter.quantize_cuda import CudaLinear

        return CudaLinear(weight, precision)
    own = own_kernels()
    if precision == "int4+int8":
        from vllm_selfspec.drafter.quantize_rows import TwoViewsLinear

        light = torch.zeros(1, dtype=torch.bool, device="cpu") if light is None else light
        return TwoViewsLinear(weight, light, own == "avx512")
    kinds: dict[str, Callable[[torch.Tensor], QuantizedLinear]] = {"int8": CpuInt8Linear, "int4": CpuInt4Linear}
    if own == "avx2":
        from vllm_selfspec.drafter.quantize_rows import RowsInt4Linear, RowsInt8Linear

        kinds |= {"int8": RowsInt8Linear, "int4": RowsInt4Linear}
    elif own == "avx512":
        from vllm_selfspec.drafter.quantize_rows import Avx512Int4Linear, Avx512Int8Linear

        kinds |= {"int8": Avx512Int8Linear, "int4": Avx512Int4Linear}
    return kinds[precision](weight)


def quantize_experts(
    gate_up: torch.Tensor, down: torch.Tensor, precision: Precision, light: torch.Tensor | None = None
) -> QuantizedExperts:
    """Quantize the experts of one layer.

    Args:
        gate_up: [E, 2 I, H] in the model's dtype, of the gates first.
        down: [E, H, I].
        precision: not `native`.
        light: as `quantize` takes it.

    Raises:
        ConfigError: if the shape does not fit the kernel.
    """
    if down.device.type != "cpu":
        from vllm_selfspec.drafter.quantize_cuda import CudaExperts

        return CudaExperts(gate_up, down, precision)
    from vllm_selfspec.drafter.quantize_rows import OperatorLinear, RowsExperts

    def linear(weight: torch.Tensor) -> OperatorLinear:
        state = quantize(weight, precision, light)
        assert isinstance(state, OperatorLinear)
        return state

    return RowsExperts(gate_up, down, linear)
