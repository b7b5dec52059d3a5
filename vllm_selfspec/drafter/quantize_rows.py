"""Drafter weights for x86 CPUs without AVX-512, applied by the kernels of `cpu_kernels.py`."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from vllm_selfspec.drafter.cpu_kernels import load
from vllm_selfspec.drafter.quantize import INT4_GROUP, QuantizedLinear, int4_groups

_PADDING = 64
"""The kernels read whole blocks of so many inputs."""


class RowsLinear(QuantizedLinear):
    """A weight [N, K] in a few tensors, which a refresh overwrites, and the product that reads them."""

    def __init__(self, weight: torch.Tensor) -> None:
        load()
        self._tensors = self._quantize(weight)

    @staticmethod
    def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    @staticmethod
    def _product(rows: torch.Tensor, tensors: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def refresh(self, weight: torch.Tensor) -> None:
        for buffer, fresh in zip(self._tensors, self._quantize(weight), strict=True):
            buffer.copy_(fresh)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = self._product(x.reshape(-1, x.shape[-1]), self._tensors, bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)


class RowsInt8Linear(RowsLinear):
    """Symmetric int8 per output channel, activations quantized per token."""

    @staticmethod
    def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """int8 [N, K padded with zeros], float32 scales [N]."""
        scale = (weight.abs().amax(dim=1).float() / 127).clamp_(min=1e-12)
        quantized = (weight.float() / scale[:, None]).round_().to(torch.int8)
        return pad(quantized, (0, -weight.shape[1] % _PADDING)).contiguous(), scale

    @staticmethod
    def _product(rows: torch.Tensor, tensors: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        quantized, scale = tensors
        return torch.ops.selfspec_cpu.int8_linear(rows, quantized, scale, bias)


class RowsInt4Linear(RowsLinear):
    """Asymmetric int4 in groups of 64 inputs, activations quantized to int8 per token and group."""

    @staticmethod
    def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """uint8 [N, 32 G], a group's first 32 inputs in the low half bytes; bfloat16 scales and minima [N, G, 2]."""
        padded = pad(weight, (0, -weight.shape[1] % INT4_GROUP))
        values, scale_and_min = int4_groups(padded, torch.bfloat16, middle=0)
        low, high = values.chunk(2, dim=-1)
        return (low | (high << 4)).flatten(1), scale_and_min

    @staticmethod
    def _product(rows: torch.Tensor, tensors: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        packed, scale_and_min = tensors
        return torch.ops.selfspec_cpu.int4_linear(rows, packed, scale_and_min, bias)
