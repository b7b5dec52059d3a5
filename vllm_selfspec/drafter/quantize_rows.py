"""Drafter weights for x86 CPUs, applied by the kernels of `cpu_kernels.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_selfspec.drafter.cpu_kernels import load
from vllm_selfspec.drafter.quantize import INT4_GROUP, QuantizedExperts, QuantizedLinear

_PADDING = 64
"""The kernels read whole blocks of so many inputs."""

_BLOCK = 16
"""The kernels for AVX-512 compute whole blocks of so many outputs."""


class OperatorLinear(QuantizedLinear):
    """A weight [N, K] that an operator of `torch.ops.selfspec_cpu` multiplies rows with.

    Attributes:
        operator: its name.
        tensors: its arguments between the rows and, where it cannot tell it from them, `outputs`; then comes the bias.
        outputs: N.
    """

    operator: str
    tensors: tuple[torch.Tensor, ...]
    outputs: int

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._product(x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], self.outputs)

    def _product(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = getattr(torch.ops.selfspec_cpu, self.operator)(rows, *self.tensors, bias)
        return result


class RowsLinear(OperatorLinear):
    """A weight [N, K] in a few tensors, which a refresh overwrites."""

    def __init__(self, weight: torch.Tensor) -> None:
        load()
        self.outputs = weight.shape[0]
        self.tensors = self._room(*weight.shape)
        self.refresh(weight)

    def _room(self, outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
        """The tensors of a weight [outputs, inputs], zeros."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class RowsInt8Linear(RowsLinear):
    """Symmetric int8 per output channel, activations quantized per token."""

    operator = "int8_linear"

    def _room(self, outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
        """int8 [N, K padded with zeros], float32 scales [N]."""
        return (
            torch.zeros(outputs, inputs + -inputs % _PADDING, dtype=torch.int8, device="cpu"),
            torch.zeros(outputs, dtype=torch.float32, device="cpu"),
        )

    def refresh(self, weight: torch.Tensor) -> None:
        torch.ops.selfspec_cpu.quantize_int8(weight, *self.tensors)


class RowsInt4Linear(RowsLinear):
    """Asymmetric int4 in groups of 64 inputs, activations quantized to int8 per token and group."""

    operator = "int4_linear"

    def _room(self, outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
        """uint8 [N, 32 G], a group's first 32 inputs in the low half bytes; bfloat16 scales and minima [N, G, 2]."""
        groups = -(-inputs // INT4_GROUP)
        return (
            torch.zeros(outputs, groups * INT4_GROUP // 2, dtype=torch.uint8, device="cpu"),
            torch.zeros(outputs, groups, 2, dtype=torch.bfloat16, device="cpu"),
        )

    def refresh(self, weight: torch.Tensor) -> None:
        torch.ops.selfspec_cpu.quantize_int4(weight, *self.tensors)


class Avx512Int8Linear(RowsLinear):
    """The values of `RowsInt8Linear`, in the order of the kernels for AVX-512."""

    operator = "avx512_int8_linear"

    def _room(self, outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
        """uint8 [N / 16, K / 64, 16, 16, 4], which is int8 + 128; float32 scales [N]."""
        blocks, groups = -(-outputs // _BLOCK), -(-inputs // _PADDING)
        return (
            torch.zeros(blocks, groups, _PADDING // 4, _BLOCK, 4, dtype=torch.uint8, device="cpu"),
            torch.zeros(outputs, dtype=torch.float32, device="cpu"),
        )

    def refresh(self, weight: torch.Tensor) -> None:
        torch.ops.selfspec_cpu.avx512_quantize_int8(weight, *self.tensors)


class Avx512Int4Linear(RowsLinear):
    """The values of `RowsInt4Linear`, in the order of the kernels for AVX-512."""

    operator = "avx512_int4_linear"

    def _room(self, outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
        """uint8 [N / 16, K / 64, 576]: 512 of half bytes, then sixteen scales and sixteen minima in bfloat16."""
        blocks, groups = -(-outputs // _BLOCK), -(-inputs // INT4_GROUP)
        size = INT4_GROUP * _BLOCK // 2 + 2 * 2 * _BLOCK
        return (torch.zeros(blocks, groups, size, dtype=torch.uint8, device="cpu"),)

    def refresh(self, weight: torch.Tensor) -> None:
        torch.ops.selfspec_cpu.avx512_quantize_int4(weight, *self.tensors, self.outputs)

    def _product(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.selfspec_cpu.avx512_int4_linear(rows, *self.tensors, self.outputs, bias)


class TwoViewsLinear(OperatorLinear):
    """int8 for the main view and int4 for the light one.

    Which one a product reads is told by a tensor, not by Python: both views are one compiled graph.
    """

    def __init__(self, weight: torch.Tensor, light: torch.Tensor, avx512: bool) -> None:
        """`light`: bool [1], read at every product; belongs to the caller."""
        self._main = (Avx512Int8Linear if avx512 else RowsInt8Linear)(weight)
        self._light = (Avx512Int4Linear if avx512 else RowsInt4Linear)(weight)
        self._flag = light
        self.operator = "avx512_views_linear" if avx512 else "views_linear"
        self.tensors = (light, *self._main.tensors, *self._light.tensors)
        self.outputs = weight.shape[0]

    def refresh(self, weight: torch.Tensor) -> None:
        self._main.refresh(weight)
        self._light.refresh(weight)

    @property
    def nbytes(self) -> int:
        return self._main.nbytes + self._light.nbytes

    @property
    def nbytes_read(self) -> int:
        return (self._light if self._flag else self._main).nbytes


class RowsExperts(QuantizedExperts):
    """Experts whose weights lie one after the other in those of an `OperatorLinear`.

    The kernels for AVX-512 store whole blocks of outputs, so that an expert must have whole ones.
    """

    def __init__(
        self, gate_up: torch.Tensor, down: torch.Tensor, linear: Callable[[torch.Tensor], OperatorLinear]
    ) -> None:
        """`linear` quantizes a weight [E N, K]."""
        self._count, _, self._width = down.shape
        self._gate_up, self._down = linear(gate_up.flatten(0, 1)), linear(down.flatten(0, 1))

    def refresh(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self._gate_up.refresh(gate_up.flatten(0, 1))
        self._down.refresh(down.flatten(0, 1))

    def apply(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None
    ) -> torch.Tensor:
        assert expert_map is None
        product, gate_up, down = self._gate_up.operator, list(self._gate_up.tensors), list(self._down.tensors)
        weights, ids = weights.float().contiguous(), ids.int().contiguous()
        return torch.ops.selfspec_cpu.experts(x, weights, ids, product, gate_up, down, self._count, self._width)

    @property
    def nbytes(self) -> int:
        return self._gate_up.nbytes + self._down.nbytes
