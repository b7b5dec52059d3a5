"""Milliseconds of all decoder layers of a draft on this CPU: the one operator that runs them, and its products alone.

    eval "$(python -m vllm_selfspec.engine_env)"
    OMP_NUM_THREADS=2 python benchmarks/draft_layers.py --out layers.json

No engine: random weights of the shapes of Qwen2.5-0.5B in bfloat16, moved to huge pages as an engine does. Both take
turns; figures are medians. `limit` is the time to read the weights at the bandwidth of summing 512 MiB. The last line
is JSON.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_kernels import LAYERS, SHAPES, bytes_per_second, seconds
from result_file import new_out, save
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_selfspec.drafter import cpu_kernels, huge_pages
from vllm_selfspec.drafter.quantize_rows import (
    Avx512Int4Linear,
    Avx512Int8Linear,
    OperatorLinear,
    RowsInt4Linear,
    RowsInt8Linear,
)
from vllm_selfspec.provenance import provenance

HEADS, KV_HEADS, HEAD_SIZE, WIDTH = 14, 2, 64, SHAPES[0][1]
BLOCK_SIZE, MAX_CONTEXT = 128, 4096
KINDS: dict[str, dict[str, type[OperatorLinear]]] = {
    "avx512": {"int8": Avx512Int8Linear, "int4": Avx512Int4Linear},
    "avx2": {"int8": RowsInt8Linear, "int4": RowsInt4Linear},
}


class Layers:
    """The layers of a draft at one precision; queries, keys and values at int8, as in a drafter."""

    def __init__(self, precision: str, context: int, most_rows: int) -> None:
        kinds = KINDS[cpu_kernels.own_kernels()]
        self._context = context
        self._table_width = -(-(context + 1) // BLOCK_SIZE)
        norm, cos_sin = torch.ones(WIDTH).bfloat16(), torch.randn(MAX_CONTEXT, HEAD_SIZE).bfloat16()
        self._operator = torch.classes.selfspec_cpu.DraftLayers(HEADS, -1, True)
        self._weights: list[list[OperatorLinear]] = []
        for _ in range(LAYERS):
            cache = torch.zeros(self._table_width * most_rows, KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE).bfloat16()
            keys, values = cache.chunk(2, dim=2)
            isa = _get_attn_isa(cache.dtype, BLOCK_SIZE, HEAD_SIZE)
            self._operator.add(keys, values, HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, -1, 0.0, isa)
            weights = [
                (kinds[precision] if index else kinds["int8"])((0.02 * torch.randn(shape)).bfloat16())
                for index, shape in enumerate(SHAPES)
            ]
            described = [
                torch.classes.selfspec_cpu.Linear(w.operator, list(w.tensors), w.outputs, None) for w in weights
            ]
            self._operator.surround([norm, norm], [1e-6, 1e-6], cos_sin, *described)
            self._weights.append(weights)
        self.nbytes = sum(weight.nbytes for weights in self._weights for weight in weights)

    def forward(self, rows: int) -> Callable[[], object]:
        """All layers for one token of each of `rows` requests."""
        table = torch.arange(rows * self._table_width, dtype=torch.int32).view(rows, -1)
        slots = table[:, -1].long() * BLOCK_SIZE + self._context % BLOCK_SIZE
        lengths, starts = torch.full((rows,), self._context + 1).int(), torch.arange(rows + 1).int()
        hidden, positions = torch.randn(rows, WIDTH).bfloat16(), torch.full((rows,), self._context)

        def run() -> None:
            self._operator.begin(rows, slots, starts, lengths, table)
            torch.ops.selfspec_cpu.draft_layers(hidden, None, positions, 0, LAYERS)
            self._operator.end()

        return run

    def products(self, rows: int) -> Callable[[], object]:
        """The products of these layers, each an operator called from Python."""
        inputs = [torch.randn(rows, columns).bfloat16() for _, columns in SHAPES]

        def run() -> None:
            for weights in self._weights:
                for weight, x in zip(weights, inputs, strict=True):
                    weight.apply(x, None)

        return run


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, default=130, help="tokens before the one that is drafted from")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not cpu_kernels.own_kernels():
        parser.exit(1, "This CPU has none of the package's kernels.\n")
    if not 0 <= args.context < MAX_CONTEXT:
        parser.error(f"--context must be from 0 to {MAX_CONTEXT - 1}")
    out = new_out(parser, args.out)
    origin = provenance()

    layers = {precision: Layers(precision, args.context, max(args.rows)) for precision in ("int8", "int4")}
    memory = torch.ones(2**27)
    huge_pages.move_to_huge_pages()
    bandwidth = bytes_per_second(memory)
    milliseconds: dict[str, dict[int, dict[str, float]]] = {precision: {} for precision in layers}
    result = {"provenance": origin, "bandwidth": bandwidth, "context": args.context, "milliseconds": milliseconds}
    for precision, one in layers.items():
        limit = 1e3 * one.nbytes / bandwidth
        for rows in args.rows:
            cases = {"layers": one.forward(rows), "products": one.products(rows)}
            times: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(args.rounds):
                for name, run in cases.items():
                    times[name].append(seconds(run))
            found = {name: 1e3 * statistics.median(each) for name, each in times.items()} | {"limit": limit}
            milliseconds[precision][rows] = found
            print(
                f"{precision}, {rows:2} rows: " + ", ".join(f"{n} {ms:.1f} ms" for n, ms in found.items()), flush=True
            )
            save(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
