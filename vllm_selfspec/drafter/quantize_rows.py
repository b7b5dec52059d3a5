"""Drafter weights for x86 CPUs without AVX-512, applied by the kernels of `cpu_kernels.py`."""

from __future__ import annotations

import torch

from vllm_selfspec.drafter.cpu_kernels import load
from vllm_selfspec.drafter.quantize import INT4_GROUP, QuantizedLinear

_PADDING = 64
"""The kernels read whole blocks of so many inputs."""


class RowsLinear(QuantizedLinear):
    """A weight [N, K] in a few tensors, which a refresh overwrites, and the product that reads them."""

    def __init__(self, weight: torch.Tensor) -> None:
        load()
        self._tensors = self._room(*weight.shape)
        self.refresh(weight)

    @staticmethod
    def _room(outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
        """The tensors of a weight [outputs, inputs], zeros."""
        raise NotImplementedError

    @staticmethod
    def _product(rows: torch.Tensor, tensors: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def refresh(self, weight: torch.Tensor) -> None:
        raise NotImplementedError

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = self._product(x.reshape(-1, x.shape[-1]), self._tensors, bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)


class RowsInt8Linear(RowsLinear):
    """Symmetric int8 per output channel, activations quantized per token."""

    @staticmethod
    def _room(outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
        """int8 [N, K padded with zeros], float32 scales [N]."""
        padded = inputs + -inputs % _PADDING
        return (
            torch.zeros(outputs, padded, dtype=torch.int8, device="cpu"),
            torch.zeros(outputs, dtype=torch.float32, device="cpu"),
        )

    def refresh(self, weight: torch.Tensor) -> None:
        torch.ops.selfspec_cpu.quantize_int8(weight, *self._tensors)

    @staticmethod
    def _product(rows: torch.Tensor, tensors: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        quantized, scale = tensors
        return torch.ops.selfspec_cpu.int8_linear(rows, quantized, scale, bias)


class RowsInt4Linear(RowsLinear):
    """Asymmetric int4 in groups of 64 inputs, activations quantized to int8 per token and group."""

    @staticmethod
    def _room(outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
        """uint8 [N, 32 G], a group's first 32 inputs in the low half bytes; bfloat16 scales and minima [N, G, 2]."""
        groups = -(-inputs // INT4_GROUP)
        return (
            torch.zeros(outputs, groups * INT4_GROUP // 2, dtype=torch.uint8, device="cpu"),
            torch.zeros(outputs, groups, 2, dtype=torch.bfloat16, device="cpu"),
        )

    def refresh(self, weight: torch.Tensor) -> None:
        torch.ops.selfspec_cpu.quantize_int4(weight, *self._tensors)

    @staticmethod
    def _product(rows: torch.Tensor, tensors: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        packed, scale_and_min = tensors
        return torch.ops.selfspec_cpu.int4_linear(rows, packed, scale_and_min, bias)
