"""Milliseconds of all linear layers and the LM head of one step, by kernel and number of rows, on this CPU.

    eval "$(python -m vllm_selfspec.engine_env)"
    OMP_NUM_THREADS=2 python benchmarks/cpu_kernels.py --out kernels.json

Random weights of the shapes of Qwen2.5-0.5B in bfloat16; times do not depend on their values. Kernels take turns round
by round; the figure is the least of the rounds, since other users of a shared machine only ever add time.
`limit` is the time to read the weights at the bandwidth of summing 512 MiB. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from result_file import new_out, save
from vllm import _custom_ops as ops

from vllm_selfspec.drafter import cpu_kernels
from vllm_selfspec.drafter.quantize import CpuInt4Linear, CpuInt8Linear, QuantizedLinear
from vllm_selfspec.drafter.quantize_rows import Avx512Int4Linear, Avx512Int8Linear, RowsInt4Linear, RowsInt8Linear
from vllm_selfspec.provenance import provenance

Linear = Callable[[torch.Tensor], torch.Tensor]
SHAPES, LAYERS, HEAD = ((1152, 896), (896, 896), (9728, 896), (896, 4864)), 24, (151936, 896)


def onednn(weight: torch.Tensor) -> Linear:
    """vLLM's product of unquantized weights, where oneDNN has one."""
    handler = ops.create_onednn_mm(weight.t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)


def quantized(kind: type[QuantizedLinear]) -> Callable[[torch.Tensor], Linear]:
    """A precision of the drafter."""

    def make(weight: torch.Tensor) -> Linear:
        linear = kind(weight)
        return lambda x: linear.apply(x, None)

    return make


KERNELS: dict[str, tuple[Callable[[torch.Tensor], Linear], float]] = {
    "bfloat16, torch": (lambda w: lambda x: torch.nn.functional.linear(x, w), 2.0),
    "bfloat16, oneDNN": (onednn, 2.0),
    "bfloat16, rows_linear": (lambda w: lambda x: torch.ops.selfspec_cpu.rows_linear(x, w, None), 2.0),
    "bfloat16, avx512_rows_linear": (lambda w: lambda x: torch.ops.selfspec_cpu.avx512_rows_linear(x, w, None), 2.0),
    "int8, oneDNN": (quantized(CpuInt8Linear), 1.0),
    "int8, int8_linear": (quantized(RowsInt8Linear), 1.0),
    "int8, avx512_int8_linear": (quantized(Avx512Int8Linear), 1.0),
    "int4, ATen": (quantized(CpuInt4Linear), 0.5625),
    "int4, int4_linear": (quantized(RowsInt4Linear), 0.5625),
    "int4, avx512_int4_linear": (quantized(Avx512Int4Linear), 0.5625),
}
"""How to apply a weight, and bytes read per weight."""


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bytes_per_second(memory: torch.Tensor) -> float:
    """At which a large tensor can be summed."""
    return memory.nbytes / min(seconds(memory.sum) for _ in range(7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = new_out(parser, args.out)
    origin = provenance()

    cpu_kernels.load()
    weights = [torch.randn(shape).bfloat16() for _ in range(LAYERS) for shape in SHAPES]
    bandwidth = bytes_per_second(torch.ones(2**27))
    values = LAYERS * sum(n * k for n, k in SHAPES) + HEAD[0] * HEAD[1]
    built: dict[str, tuple[list[Linear], Linear]] = {}
    for name, (make, _) in KERNELS.items():
        try:
            layers, head = [make(weight) for weight in weights], make(torch.randn(HEAD).bfloat16())
            layers[0](torch.randn(1, SHAPES[0][1]).bfloat16())
        except (RuntimeError, AttributeError) as error:
            print(f"{name}: not on this CPU ({str(error).splitlines()[0]})")
            continue
        built[name] = (layers, head)
    best: dict[str, dict[int, float]] = {name: {} for name in built}
    for rows in args.rows:
        inputs = [torch.randn(rows, k).bfloat16() for _, k in SHAPES]
        for _ in range(args.rounds):
            for name, (layers, head) in built.items():

                def step(layers: list[Linear] = layers, head: Linear = head, inputs: list = inputs) -> None:
                    for index, layer in enumerate(layers):
                        layer(inputs[index % len(SHAPES)])
                    head(inputs[0])

                best[name][rows] = min(best[name].get(rows, float("inf")), seconds(step))
        print(f"{rows:3} rows: " + ", ".join(f"{name} {best[name][rows] * 1e3:.0f} ms" for name in built), flush=True)
        result = {
            "provenance": origin,
            "bandwidth": bandwidth,
            "limit_ms": {name: 1e3 * KERNELS[name][1] * values / bandwidth for name in built},
            "milliseconds": {name: {n: 1e3 * value for n, value in found.items()} for name, found in best.items()},
        }
        save(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
