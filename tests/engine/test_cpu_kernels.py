"""The kernels for x86 CPUs. Those without AVX-512 run on every one with AVX2, so they are tested on all of those."""

import functools
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import AVX512_HALF, HALF_PRODUCTS

from vllm_selfspec.compat import cpu_half_linear
from vllm_selfspec.drafter import cpu_kernels
from vllm_selfspec.drafter.quantize import CpuInt4Linear, CpuInt8Linear, int4_groups
from vllm_selfspec.drafter.quantize_rows import (
    Avx512Int4Linear,
    Avx512Int8Linear,
    RowsExperts,
    RowsInt4Linear,
    RowsInt8Linear,
    RowsLinear,
    TwoViewsLinear,
)
from vllm_selfspec.provenance import cpu_fact

pytestmark = pytest.mark.skipif(
    not any(name in torch.backends.cpu.get_cpu_capability() for name in ("AVX2", "AVX512")), reason="needs AVX2"
)

SHAPES = [(64, 64), (35, 72), (100, 576), (97, 1000), (50, 2088)]
ROWS = [1, 2, 3, 4, 5, 7, 16, 33, 130]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    cpu_kernels.load()


def weight_of(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(dtype)


def rows_of(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("product", HALF_PRODUCTS)
def test_rows_linear_is_the_product(
    product: str, shape: tuple[int, int], weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = weight_of(shape, weight_dtype)
    bias = rows_of(1, shape[0], dtype)[0]
    operator = getattr(torch.ops.selfspec_cpu, product)
    for count in ROWS:
        x = rows_of(count, shape[1], dtype)
        expected = x.double() @ weight.double().t() + bias.double()
        # float32 sums, then one rounding to x's type
        assert error(operator(x, weight, bias), expected) < max(torch.finfo(dtype).eps, 1e-5)
        assert error(operator(x, weight, None), expected - bias.double()) < max(torch.finfo(dtype).eps, 1e-5)


def int8_values(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


def int4_values(weight: torch.Tensor) -> torch.Tensor:
    """What the weight is quantized to, as its packed tensors say."""
    packed, scale_and_min = RowsInt4Linear(weight).tensors
    halves = packed.unflatten(1, (-1, 32))
    scale, low = scale_and_min.float().unbind(-1)
    values = torch.cat((halves & 15, halves >> 4), dim=-1) * scale[..., None] + low[..., None]
    return values.flatten(1)[:, : weight.shape[1]]


KINDS = {RowsInt8Linear: int8_values, RowsInt4Linear: int4_values}
if set(cpu_fact("flags").split()) >= cpu_kernels.AVX512_FLAGS:
    KINDS |= {Avx512Int8Linear: int8_values, Avx512Int4Linear: int4_values}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_products(shape: tuple[int, int], kind: type[RowsLinear], dtype: torch.dtype) -> None:
    weight = weight_of(shape)
    linear = kind(weight)
    values = KINDS[kind](weight).double()
    for count in ROWS:
        x = rows_of(count, shape[1], dtype)
        bias = rows_of(1, shape[0], dtype)[0]
        # eight bits of activations, whose rounding is 1/254 of the largest of a row
        assert error(linear.apply(x, bias), x.double() @ values.t() + bias.double()) < 0.02


EXPERTS, WIDTH, HIDDEN = 5, 72, 144


def experts_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights up and down, of experts whose sizes differ."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.arange(1, EXPERTS + 1).view(-1, 1, 1) / HIDDEN**0.5
    up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) * size
    return up, torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) * size


def mixed(
    x: torch.Tensor, chosen: torch.Tensor, ids: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """What the experts `ids` [T, k], times `chosen`, make of rows [T, HIDDEN]: one row and one expert at a time."""
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for row in range(len(x)):
        for weight, expert in zip(chosen[row], ids[row], strict=True):
            gate, value = (up[expert].double() @ x[row].double()).chunk(2)
            out[row] += weight * (down[expert].double() @ (torch.nn.functional.silu(gate) * value))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_those_of_each_row(kind: type[RowsLinear], dtype: torch.dtype) -> None:
    """Before and after a refresh, which keeps the places of the weights; some experts have no row, some all."""
    up, down = experts_of(1)
    experts = RowsExperts(up, down, kind)
    places = [tensor.data_ptr() for linear in (experts._gate_up, experts._down) for tensor in linear.tensors]
    for seed in (1, 2):
        if seed == 2:
            up, down = experts_of(2)
            experts.refresh(up, down)
        values = [KINDS[kind](weight.flatten(0, 1)).view(weight.shape) for weight in (up, down)]
        for count in (1, 3, 40):
            generator = torch.Generator().manual_seed(count)
            x = rows_of(count, HIDDEN, dtype)
            ids = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :2].int()
            chosen = torch.rand(count, 2, generator=generator)
            expected = mixed(x, chosen, ids, *values)
            assert error(experts.apply(x, chosen, ids, None), expected) < 0.03
    assert places == [tensor.data_ptr() for linear in (experts._gate_up, experts._down) for tensor in linear.tensors]
    assert experts.nbytes == experts._gate_up.nbytes + experts._down.nbytes > 0


def test_an_expert_that_is_not_there_is_an_error() -> None:
    experts = RowsExperts(*experts_of(1), RowsInt8Linear)
    with pytest.raises(RuntimeError, match="expert 5 of 5"):
        experts.apply(torch.zeros(1, HIDDEN), torch.ones(1, 1), torch.tensor([[5]]), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [CpuInt8Linear, CpuInt4Linear])
def test_products_of_the_libraries_follow_a_refresh_in_place(
    kind: type[CpuInt8Linear | CpuInt4Linear], dtype: torch.dtype
) -> None:
    """What draft where the package's own kernels cannot be built."""

    def values_of(weight: torch.Tensor) -> torch.Tensor:
        if kind is CpuInt8Linear:
            return int8_values(weight.float())
        q, scale_and_zero = int4_groups(weight, dtype)
        scale, zero = scale_and_zero.float().split(1, dim=-1)
        return ((q.float() - 8) * scale + zero).flatten(1)

    def places() -> list[int]:
        if isinstance(linear, CpuInt8Linear):
            return [linear._scale.data_ptr(), linear._handler.handler_tensor.data_ptr()]
        return [linear._packed.data_ptr(), linear._scale_and_zero.data_ptr()]

    before, bias = weight_of((64, 128), dtype), rows_of(1, 64, dtype)[0]
    after = before.flip(0) * 3
    linear = kind(before)
    before_refresh = places()
    for weight in (before, after):
        if weight is after:
            linear.refresh(after)
        values = values_of(weight).double()
        for count in (1, 3, 16):
            x = rows_of(count, 128, dtype)
            expected = x.double() @ values.t()
            assert error(linear.apply(x, None), expected) < 0.02
            assert error(linear.apply(x[None], bias)[0], expected + bias.double()) < 0.02
    assert places() == before_refresh
    bits = 8 if kind is CpuInt8Linear else 4
    assert after.numel() * bits / 8 < linear.nbytes < after.numel() * bits / 8 * 1.6


def test_extreme_activations_do_not_saturate() -> None:
    """16-bit sums of two products would overflow first where every weight and activation is the largest."""
    ones = torch.ones(5, 256)
    signs = torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0)
    for weight in (ones, -ones, ones * signs):
        for kind in KINDS:
            for x in (ones[:1], -ones[:1], ones[:1] * signs):
                expected = x.double() @ KINDS[kind](weight).double().t()
                got = kind(weight).apply(x, None)
                assert (got.double() - expected).abs().max() < 0.5, (kind, expected[0, 0])


def test_rows_do_not_depend_on_each_other() -> None:
    """A row's result is the same in any batch: acceptance must not depend on who else is running."""
    weight, x = weight_of((100, 2088)), rows_of(50, 2088, torch.bfloat16)
    products = [kind(weight) for kind in KINDS]
    for apply in (
        *(
            functools.partial(getattr(torch.ops.selfspec_cpu, name), weight=weight.to(dtype), bias=None)
            for name in HALF_PRODUCTS
            for dtype in (torch.bfloat16, torch.float16)
        ),
        *(functools.partial(linear.apply, bias=None) for linear in products),
    ):
        alone = torch.cat([apply(row[None]) for row in x])
        for count in (2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 50):
            assert torch.equal(apply(x[:count]), alone[:count]), (apply, count)


@pytest.mark.parametrize("shape", [(100, 160), (5, 64)])
def test_threads_do_not_matter(shape: tuple[int, int]) -> None:
    """Threads share the outputs out: each is computed, and in the same way, however many there are."""
    weight, x = weight_of(shape), rows_of(9, shape[1], torch.bfloat16)
    halves = [
        functools.partial(getattr(torch.ops.selfspec_cpu, name), weight=weight.to(dtype))
        for name in HALF_PRODUCTS
        for dtype in (torch.bfloat16, torch.float16)
    ]
    threads, got = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7, 40):
            torch.set_num_threads(count)
            got.append([apply(x, bias=None) for apply in (*halves, *(kind(weight).apply for kind in KINDS))])
    finally:
        torch.set_num_threads(threads)
    for others in got[1:]:
        assert all(map(torch.equal, others, got[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_refresh_keeps_the_buffers(kind: type[RowsLinear]) -> None:
    linear, fresh = kind(weight_of((64, 128))), weight_of((64, 128)) * 3 + 0.1
    places = [tensor.data_ptr() for tensor in linear.tensors]
    linear.refresh(fresh)
    x = rows_of(3, 128, torch.float32)
    assert [tensor.data_ptr() for tensor in linear.tensors] == places
    assert torch.equal(linear.apply(x, None), kind(fresh).apply(x, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_quantized_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """As with torch's operators, rounding halves to even."""
    weight = weight_of(shape, dtype)
    weight[3] = 0.0
    weight[4, :8] = torch.tensor([1.0, -1.0, 0.5, -0.5, 127.0, -127.0, 1.5, 2.5])
    wide = weight.float()

    values, scale = RowsInt8Linear(weight).tensors
    expected = (wide.abs().amax(dim=1) / 127).clamp(min=1e-12)
    assert torch.equal(scale, expected)
    assert torch.equal(values[:, : shape[1]], (wide / expected[:, None]).round().to(torch.int8))
    assert not values[:, shape[1] :].any()

    packed, scale_and_min = RowsInt4Linear(weight).tensors
    groups = torch.nn.functional.pad(wide, (0, -shape[1] % 64)).unflatten(1, (-1, 64))
    scale, low = scale_and_min.float().unsqueeze(-1).unbind(-2)
    expected = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8)
    assert torch.equal(packed.unflatten(1, (-1, 32)), expected[..., :32] | (expected[..., 32:] << 4))


def int4_error(groups: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Squared error of each group of 64, scale and minimum [..., 1] as bfloat16 holds them."""
    scale, low = scale.bfloat16().float(), low.bfloat16().float()
    return (((groups - low) / scale).round().clamp(0, 15) * scale + low - groups).square().sum(dim=-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_fits_its_groups(shape: tuple[int, int]) -> None:
    """No group is worse off than with sixteen values from the least to the greatest, and most are better."""
    weight = weight_of(shape, torch.bfloat16).float()
    weight[3] = 0.0
    weight[4] = 0.25
    groups = torch.nn.functional.pad(weight, (0, -shape[1] % 64)).unflatten(1, (-1, 64))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    between = int4_error(groups, ((high - low) / 15).clamp(min=1e-8), low)
    scale, low = RowsInt4Linear(weight).tensors[1].float().unsqueeze(-1).unbind(-2)
    own = int4_error(groups, scale, low)
    assert (own <= between * 1.0001 + 1e-12).all()
    assert own.sum() < 0.95 * between.sum()

    if shape[1] % 64 == 0:  # ATen's kernel takes no other
        q, pairs = int4_groups(weight, torch.bfloat16)
        scale, zero = pairs.float().unsqueeze(-1).unbind(-2)
        assert torch.allclose(((q.float() - 8) * scale + zero - groups).square().sum(dim=-1), own, rtol=0.2, atol=1e-6)


@pytest.mark.skipif(Avx512Int8Linear not in KINDS, reason="needs AVX-512 and VNNI")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_avx512_weights_are_the_same_in_another_order(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    outputs, blocks = shape[0], -(-shape[0] // 16)
    values, scale = RowsInt8Linear(weight).tensors
    stream, other_scale = Avx512Int8Linear(weight).tensors
    assert torch.equal(scale, other_scale)
    unpacked = (stream.permute(0, 3, 1, 2, 4).reshape(16 * blocks, -1).int() - 128).to(torch.int8)
    assert torch.equal(unpacked[:outputs], values) and not unpacked[outputs:].any()

    packed, scale_and_min = RowsInt4Linear(weight).tensors
    (stream,) = Avx512Int4Linear(weight).tensors
    quads = stream[:, :, :512].reshape(blocks, -1, 8, 16, 4).permute(0, 3, 1, 2, 4)
    assert torch.equal(quads.reshape(16 * blocks, -1)[:outputs], packed)
    pairs = stream[:, :, 512:].contiguous().view(torch.bfloat16).unflatten(2, (2, 16)).permute(0, 3, 1, 2)
    assert torch.equal(pairs.reshape(16 * blocks, -1, 2)[:outputs], scale_and_min)


@pytest.mark.parametrize("kind", KINDS)
def test_refresh_refuses_another_shape(kind: type[RowsLinear]) -> None:
    linear = kind(weight_of((64, 128)))
    for shape in ((60, 128), (65, 128), (64, 1000)):
        with pytest.raises(RuntimeError, match="another shape"):
            linear.refresh(weight_of(shape))


@pytest.mark.parametrize(("rows", "tokens"), [(1, 7), (3, 512), (5, 513), (16, 5000)])
def test_drawn_tokens_are_those_of_the_cumulative_sum(rows: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.rand(rows, tokens, generator=generator) ** 8
    weights[:, torch.rand(tokens, generator=generator) < 0.3] = 0.0
    weights[:, 0] = weights[:, -1] = 0.0
    weights[0] = 0.0
    weights[0, tokens // 2] = 3.0
    edges = [0.0, 0.5, math.nextafter(1.0, 0.0)]
    for u in (*edges, *torch.rand(200, dtype=torch.float64, generator=generator).tolist()):
        numbers = torch.full((rows,), u, dtype=torch.float64)
        drawn = torch.ops.selfspec_cpu.inverse_cdf(weights, numbers)
        cumulative = weights.double().cumsum(dim=1)
        assert (weights.gather(1, drawn[:, None]) > 0).all()
        # up to the order of adding up
        below = cumulative - weights
        at = numbers * cumulative[:, -1]
        assert (below.gather(1, drawn[:, None])[:, 0] <= at + 1e-12 * tokens).all()
        assert (cumulative.gather(1, drawn[:, None])[:, 0] >= at - 1e-12 * tokens).all()
    assert drawn[0] == tokens // 2


@pytest.mark.parametrize("avx512", [False, True])
def test_one_compiled_graph_holds_both_views(avx512: bool) -> None:
    main, lighter = (Avx512Int8Linear, Avx512Int4Linear) if avx512 else (RowsInt8Linear, RowsInt4Linear)
    if main not in KINDS:
        pytest.skip("needs AVX-512 and VNNI")
    weight, x, bias = weight_of((35, 72)), rows_of(3, 72, torch.float32), rows_of(1, 35, torch.float32)[0]
    light = torch.zeros(1, dtype=torch.bool)
    views = TwoViewsLinear(weight, light, avx512)
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(views.apply, backend=backend, dynamic=True)
    for new in (weight, 2 * weight):
        views.refresh(new)
        for is_light, kind in ((False, main), (True, lighter), (False, main)):
            light.fill_(is_light)
            expected = kind(new)
            assert torch.equal(compiled(x, bias), expected.apply(x, bias))
            assert views.nbytes_read == expected.nbytes
    assert len(graphs) == 1
    assert views.nbytes == main(weight).nbytes + lighter(weight).nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_compiles(kind: type[RowsLinear]) -> None:
    linear = kind(weight_of((64, 128)))
    compiled = torch.compile(lambda x: linear.apply(x, None) * 2, fullgraph=True)
    x = rows_of(3, 128, torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)  # an error where the graph would hold for three rows alone
    assert torch.equal(compiled(x), linear.apply(x, None) * 2)


@pytest.mark.parametrize("product", HALF_PRODUCTS)
def test_the_mend_takes_only_what_vllm_serves_badly(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_half_linear, "half_product", lambda: product)
    monkeypatch.setattr(cpu_half_linear, "badly_served", lambda: {torch.bfloat16})

    def dispatch(weight: torch.Tensor, packs: bool) -> object:
        layer = SimpleNamespace(weight=weight, cpu_linear=None)

        def original(layer: SimpleNamespace, remove_weight: bool) -> None:
            layer.cpu_linear = "vLLM's"
            if packs:
                layer.weight = torch.empty(0, dtype=weight.dtype)

        cpu_half_linear.dispatch(original, layer, True)
        return layer.cpu_linear

    half, linear = weight_of((64, 128), torch.bfloat16), cpu_half_linear.linear_by(product)
    assert dispatch(half, packs=False) is linear
    # with AVX-512 it is the slow one that vLLM packs the weight for
    assert dispatch(half, packs=True) is (linear if product == "avx512_rows_linear" else "vLLM's")
    assert dispatch(half.half(), packs=False) == dispatch(half.float(), packs=False) == "vLLM's"
    x = rows_of(6, 128, torch.bfloat16).reshape(2, 3, 128)
    assert error(linear(x, half, None), x.double() @ half.double().t()) < 0.01
    monkeypatch.setattr(cpu_half_linear, "_zentorch_serves", lambda: True)
    assert dispatch(half, packs=False) == "vLLM's"


@pytest.mark.parametrize("product", HALF_PRODUCTS)
def test_the_models_layers_compile(product: str) -> None:
    weight = weight_of((64, 128), torch.bfloat16)
    linear = cpu_half_linear.linear_by(product)
    compiled = torch.compile(lambda x: linear(x, weight, None) * 2, fullgraph=True)
    x = rows_of(3, 128, torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    assert torch.equal(compiled(x), linear(x, weight, None) * 2)


@pytest.mark.parametrize(
    ("capability", "flags", "kind", "badly"),
    [
        ("AVX2", {"avx2"}, "avx2", {torch.bfloat16, torch.float16}),
        ("AVX512", {"avx2", *AVX512_HALF}, "avx2", {torch.bfloat16, torch.float16}),  # Skylake
        ("AVX512", cpu_kernels.AVX512_FLAGS, "avx512", {torch.bfloat16, torch.float16}),  # Ice Lake
        ("AVX512", cpu_kernels.AVX512_FLAGS | {"avx512_bf16"}, "avx512", {torch.bfloat16, torch.float16}),  # Zen 4
        ("AVX2", cpu_kernels.AVX512_FLAGS | {"avx512_bf16"}, "avx2", {torch.float16}),  # Zen 4, torch held at AVX2
        ("AVX512", cpu_kernels.AVX512_FLAGS | {"avx512_bf16", "avx512_fp16", "amx_bf16"}, "avx512", set()),  # with AMX
    ],
)
def test_the_kernels_of_a_cpu(
    capability: str, flags: set[str], kind: str, badly: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_kernels, "cpu_fact", lambda name: " ".join(flags))
    monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    # what -march=native compiles there
    monkeypatch.setattr(torch.ops, "selfspec_cpu", SimpleNamespace(rows_linear=None, avx512_int8_linear=None))
    found = cpu_kernels.own_kernels.__wrapped__()
    assert found == kind
    monkeypatch.setattr(cpu_kernels, "own_kernels", lambda: found)
    assert cpu_kernels.badly_served.__wrapped__() == badly


@pytest.mark.parametrize(("capability", "flags"), [("AVX2", set()), ("AVX512", {"avx512_bf16"}), ("AVX512", set())])
def test_without_a_compiler_it_says_so(
    capability: str,
    flags: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_kernels, "cpu_fact", lambda name: " ".join(cpu_kernels.AVX512_FLAGS | flags))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_kernels.logger, "propagate", True)
    cpu_kernels.load.cache_clear()
    for compiler, reason in (("/nowhere/g++", "/nowhere/g++"), ("false", "")):
        monkeypatch.setenv("CXX", compiler)
        caplog.clear()
        assert cpu_kernels.own_kernels.__wrapped__() == ""
        assert "install g++" in caplog.text and reason in caplog.text
        assert ("verifying" in caplog.text) == (not flags)
    assert not list((tmp_path / "vllm-selfspec" / "kernels").iterdir())


@pytest.mark.parametrize(
    ("most", "kind", "badly", "options"),
    [
        ("", "avx512", set(), []),
        ("AVX512_CORE_AMX", "avx512", set(), []),
        ("avx512_core_bf16", "avx512", {torch.bfloat16, torch.float16}, ["-mno-amx-bf16", "-mno-avx512fp16"]),
        ("AVX512_CORE_VNNI", "avx512", {torch.bfloat16, torch.float16}, ["-mno-avx512bf16"]),
        ("AVX2", "avx2", {torch.bfloat16, torch.float16}, ["-mno-avx512f", "-mno-avx512vnni"]),
    ],
)
def test_what_onednn_is_not_to_use_is_not_used(
    most: str, kind: str, badly: set[torch.dtype], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an older CPU can be played: its kernels, and the choice among them."""
    flags = cpu_kernels.AVX512_FLAGS | {"avx2", "avx512_bf16", "avx512_fp16", "amx_bf16"}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu_kernels, "cpu_fact", lambda name: " ".join(flags))
    monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    monkeypatch.setattr(torch.ops, "selfspec_cpu", SimpleNamespace(rows_linear=None, avx512_int8_linear=None))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    everything = cpu_kernels.library_path()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    assert cpu_kernels.own_kernels.__wrapped__() == kind
    monkeypatch.setattr(cpu_kernels, "own_kernels", lambda: kind)
    assert cpu_kernels.badly_served.__wrapped__() == badly
    assert set(options) <= set(cpu_kernels._without_withheld())
    assert (cpu_kernels.library_path() == everything) == (not options)


def test_an_option_that_the_compiler_does_not_know_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of AVX512_FP16 before g++ 12, which has none of its instructions either."""
    old = tmp_path / "g++"
    old.write_text('#!/bin/sh\ncase "$*" in *-mno-avx512fp16*) exit 1;; esac\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    monkeypatch.setattr(cpu_kernels, "cpu_fact", lambda name: "amx_bf16 avx512_fp16 avx2")
    assert cpu_kernels._without_withheld() == ["-mno-amx-bf16"]


def test_the_compiler_may_have_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(cpu_kernels, "_run", lambda command: commands.append(command) or Path(command[-1]).touch())
    for variable, program in (("ccache g++", ["ccache", "g++"]), ("", ["g++"])):
        monkeypatch.setenv("CXX", variable)
        commands.clear()
        cpu_kernels.build(tmp_path / "kernels.so")
        assert len(commands) > 2 and all(command[: len(program)] == program for command in commands)


def test_a_library_that_cannot_be_loaded_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another container may have left it in a home that both have, built by newer tools."""
    library = tmp_path / "kernels.so"
    library.write_text("from elsewhere")

    def load_library(path: str) -> None:
        if Path(path).read_text() != "built here":
            raise OSError("version `GLIBCXX_3.4.32' not found")

    monkeypatch.setattr(cpu_kernels, "library_path", lambda: library)
    monkeypatch.setattr(cpu_kernels, "build", lambda path: path.write_text("built here"))
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    cpu_kernels.load.__wrapped__()
    assert library.read_text() == "built here"


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(cpu_kernels.logger, "propagate", True)
    cpu_kernels.load.cache_clear()
    assert cpu_kernels.own_kernels.__wrapped__() == ""
    assert "set XDG_CACHE_HOME" in caplog.text


def test_other_cpus_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without AVX2, for one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(cpu_kernels, "cpu_fact", lambda name: "sse4_2 avx")
    monkeypatch.setattr(cpu_kernels, "load", lambda: pytest.fail("built"))
    assert cpu_kernels.own_kernels.__wrapped__() == ""


def test_no_openmp_runtime_is_linked() -> None:
    """A second runtime beside torch's would start threads of its own on the same cores."""
    needed = subprocess.run(
        ["readelf", "-d", str(cpu_kernels.library_path())], capture_output=True, text=True, check=True
    ).stdout
    assert "libc10" in needed and "omp" not in needed
