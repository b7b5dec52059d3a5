"""The CUDA parts of the drafter, run on CPU with stand-ins for what only a GPU has: kernels, graphs, runner state."""

from __future__ import annotations

import inspect
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_kernels
import pytest
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor import parameter
from vllm.model_executor.kernels import linear
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu import model_runner as v2_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_selfspec.config import ConfigError
from vllm_selfspec.control.calibrate import read_sweep
from vllm_selfspec.control.policy import StepObservation
from vllm_selfspec.drafter import quantize_cuda, verify_graphs
from vllm_selfspec.drafter import speculator as speculator_module
from vllm_selfspec.drafter.quantize_cuda import (
    CudaLinear,
    default_cuda_precision,
    quantize_int4,
    usable_cuda_precisions,
)
from vllm_selfspec.drafter.runner import RUNNER_VARIABLE, choose_runner, every_draft_length, unsupported_on_v2
from vllm_selfspec.drafter.verify_graphs import MOST_TOKENS, WITH_DRAFTS, decode_batches
from vllm_selfspec.drafter.view import DraftModel
from vllm_selfspec.plugin import IN_V2_WORKERS, older_than, register


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's choosers hand out the stand-ins above; parameters need no tensor-parallel group."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)

    for name, function in plain_kernels.CHOOSERS.items():
        monkeypatch.setattr(linear, name, function)
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
    monkeypatch.setattr(
        plain_kernels.PlainInt4Kernel, "can_implement", classmethod(lambda cls, c: (False, "no such\n device"))
    )
    with pytest.raises(ConfigError, match="to another precision or 'native'") as caught:
        CudaLinear(torch.randn(32, 128), "int4")
    assert "\n" not in str(caught.value)


def test_marlin_multiplies_what_vllm_would_give_to_humming(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class HummingLinearKernel(plain_kernels.PlainInt4Kernel):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            raise AttributeError("vLLM's reads layer.has_bias")

    monkeypatch.setattr(linear, "choose_mp_linear_kernel", lambda _: HummingLinearKernel)
    monkeypatch.setattr(linear, "MarlinLinearKernel", plain_kernels.PlainInt4Kernel)
    weight, x = torch.randn(32, 128), torch.randn(4, 128)
    assert relative_error(CudaLinear(weight, "int4").apply(x, None), x @ weight.t()) < ERROR["int4"]
    monkeypatch.setattr(
        plain_kernels.PlainInt4Kernel, "can_implement", classmethod(lambda cls, c: (False, "not on this device"))
    )
    with pytest.raises(ConfigError, match="not on this device"):
        CudaLinear(weight, "int4")


@pytest.mark.parametrize(("columns", "group"), [(256, 64), (192, 64), (96, 32)])
def test_int4_uses_the_largest_group_that_divides(kernels: None, columns: int, group: int) -> None:
    state = CudaLinear(torch.randn(16, columns), "int4")
    assert state._kernel.config.group_size == group
    assert state._layer.weight_scale.shape == (columns // group, 16)


def int4_values(weight: torch.Tensor, fits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What [N, K] becomes in groups of 64, [N, K / 64, 64], and the scales."""
    packed, scale = quantize_int4(weight, 64, torch.bfloat16, fits)
    levels = ((packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).reshape(len(weight), -1, 64)
    return (levels - 8) * scale.float().unsqueeze(-1), scale


def test_int4_fits_every_group() -> None:
    weight = torch.randn(64, 512)
    before, after = ((int4_values(weight, fits)[0] - weight.reshape(64, 8, 64)).square().sum(dim=-1) for fits in (0, 2))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.mean() < 0.97 * before.mean()


def test_int4_reaches_the_extreme_of_every_group_and_zero_groups_stay_zero() -> None:
    weight = torch.randn(8, 128)
    weight[3] = 0
    values, scale = int4_values(weight, fits=0)
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
        (89, "int4", {"native", "int4", "int8", "fp8"}),
        (90, "int4", {"native", "int4", "int8", "fp8"}),
        (100, "int4", {"native", "int4", "fp8"}),
    ],
)
def test_precisions_by_compute_capability(
    kernels: None, monkeypatch: pytest.MonkeyPatch, capability: int | None, default: str, usable: set[str]
) -> None:
    monkeypatch.setattr(quantize_cuda, "_capability", lambda: capability)
    assert default_cuda_precision() == default
    assert set(usable_cuda_precisions()) == usable


@pytest.mark.parametrize(("capability", "default"), [(80, "native"), (89, "fp8"), (90, "fp8")])
def test_default_without_an_int4_kernel(
    kernels: None, monkeypatch: pytest.MonkeyPatch, capability: int, default: str
) -> None:
    monkeypatch.setattr(quantize_cuda, "_capability", lambda: capability)
    monkeypatch.setattr(plain_kernels.PlainInt4Kernel, "can_implement", classmethod(lambda cls, c: (False, "none")))
    assert default_cuda_precision() == default


def test_this_machine_has_no_cuda_precision() -> None:
    assert quantize_cuda._capability() is None and usable_cuda_precisions() == ["native"]


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


# Runner V2. The config is a real one; the model, the block tables and the attention metadata are stand-ins.

BLOCK, MAX_LEN, MAX_DRAFTS = 4, 24, 3


class Recorder(DraftModel):
    """A drafter whose next token is the last one plus the position, and that notes what each forward pass saw."""

    def __init__(self, speculator: Any) -> None:
        super().__init__(nn.Identity(), nn.Identity())
        self._head = (SimpleNamespace(compute_logits=self._logits),)
        self.steps: list[dict[str, list[int]]] = []
        self._speculator = (speculator,)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        buffers, tables = self._speculator[0].input_buffers, self._speculator[0].block_tables
        self.steps.append(
            {
                "tokens": input_ids.tolist(),
                "positions": positions.tolist(),
                "seq_lens": buffers.seq_lens.tolist(),
                "slots": tables.slot_mappings[0].tolist(),
                "query_start_loc": buffers.query_start_loc.tolist(),
            }
        )
        return (input_ids + positions).float().unsqueeze(1)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(hidden[:, 0].long() % 256, 256).to(torch.bfloat16)


def fake_block_tables(rows: list[list[int]], max_num_reqs: int) -> SimpleNamespace:
    """The block tables of a batch. Past the allocated blocks a row keeps other requests' ids, as vLLM's do."""
    table = torch.full((max_num_reqs, MAX_LEN // BLOCK), 99, dtype=torch.int32)
    for row, blocks in enumerate(rows):
        table[row, : len(blocks)] = torch.tensor(blocks)
    counts = torch.zeros(1, max_num_reqs, dtype=torch.int32)
    return SimpleNamespace(
        input_block_tables=[table],
        num_blocks=SimpleNamespace(gpu=counts),
        block_sizes=[BLOCK],
        slot_mappings=torch.full((1, 64), 77, dtype=torch.int64),
        cp_size=1,
    )


@pytest.fixture
def vllm_config(tiny: Callable[..., str]) -> VllmConfig:
    register()
    arguments = EngineArgs(
        model=tiny(),
        dtype="bfloat16",
        max_model_len=MAX_LEN,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        enforce_eager=True,
        skip_tokenizer_init=True,
        speculative_config={
            "method": "selfspec",
            "num_speculative_tokens": MAX_DRAFTS,
            "drafter": {"weights": "native", "lm_head": "native"},
            "control": {"mode": "fixed"},
        },
    )
    return arguments.create_engine_config()


def test_graphs_are_cached_for_every_draft_length_but_not_every_drafter(tiny: Callable[..., str]) -> None:
    def key(drafts: int, **drafter: Any) -> str:
        arguments = EngineArgs(
            model=tiny(),
            speculative_config={"method": "selfspec", "num_speculative_tokens": drafts, "drafter": drafter},
        )
        return arguments.create_engine_config().speculative_config.compute_hash()

    register()
    assert key(3) == key(5)
    assert len({key(3), key(3, exit_layer=2), key(3, exit_layer=3), key(3, weights="native")}) == 4


@pytest.fixture
def speculator(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = speculator_module.init_speculator(never_called, vllm_config, torch.device("cpu"), None)
    with monkeypatch.context() as patch:
        patch.setattr(speculator_module, "build_view", lambda *_: (Recorder(made), set()))
        made.model = made.load_draft_model(nn.Identity(), set())
    made.attn_groups = []
    made.kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer"])])
    made.builds, made.draws = [], []
    made._updates_metadata, made._block_size = True, BLOCK
    alone = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.get_pp_group", lambda: alone)
    made.init_cudagraph_manager(CUDAGraphMode.NONE)

    def build(desc: Any, num_reqs: int, upper_bound: torch.Tensor, step: int) -> dict[str, Any]:
        made.builds.append((num_reqs, step, made.draft_max_seq_len))
        return {"layer": None}

    def argmax(
        logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        *_: Any,
        logits_cache: Any,
        logits_cache_col: Any,
        **__: Any,
    ) -> torch.Tensor:
        assert logits.dtype == logits_cache.dtype
        made.draws.append({})
        for row, request in enumerate(idx_mapping.tolist()):
            if request >= 0:
                logits_cache[request, int(logits_cache_col)] = logits[row]
                own = (temperature[request], seeds[request], positions[row])
                made.draws[-1][request] = tuple(value.item() for value in own)
        return logits.argmax(dim=-1)

    monkeypatch.setattr(made, "_build_metadata", build)
    monkeypatch.setattr("vllm.v1.worker.gpu.spec_decode.speculator.gumbel_sample", argmax)
    return made


def never_called(*_: Any) -> None:
    raise AssertionError("vLLM's own must not be asked")


def propose(speculator: Any, batch: list[dict[str, Any]], **arguments: Any) -> torch.Tensor:
    """One call of `propose` for requests given as state (index), last, seq_len, rejected, sampled, blocks."""
    state = torch.tensor([request["state"] for request in batch])
    speculator.block_tables = fake_block_tables([request["blocks"] for request in batch], speculator.max_num_reqs)
    last = torch.zeros(speculator.max_num_reqs, 1, dtype=torch.int64)
    for request in batch:
        speculator._num_blocks[request["state"]] = len(request["blocks"])
        last[request["state"]] = request["last"]
    seq_lens = torch.tensor([request["seq_len"] for request in batch], dtype=torch.int32)
    input_batch = SimpleNamespace(
        num_reqs=len(batch), idx_mapping=state, seq_lens=seq_lens, seq_lens_cpu_upper_bound=seq_lens
    )
    return speculator.propose(
        input_batch,
        {},
        {},
        torch.empty(0),
        None,
        torch.tensor([request.get("sampled", 1) for request in batch], dtype=torch.int32),
        torch.tensor([request.get("rejected", 0) for request in batch], dtype=torch.int32),
        last,
        torch.empty(0),
        torch.arange(speculator.max_num_reqs) / 4,  # temperature
        torch.arange(speculator.max_num_reqs) + 100,  # seeds
        **arguments,
    )


BATCH = [
    {"state": 4, "last": 5, "seq_len": 8, "rejected": 2, "blocks": [10, 11, 12]},  # room for all drafts
    {"state": 1, "last": 7, "seq_len": 7, "blocks": [20, 21]},  # one slot left in its last block
    {"state": 0, "last": 9, "seq_len": 5, "sampled": 0, "blocks": [30, 31]},  # in the middle of its prompt
    {"state": 2, "last": 3, "seq_len": 23, "blocks": [40, 41, 42, 43, 44, 45]},  # at max_model_len
]


def test_v2_drafts_continue_each_request_from_its_last_accepted_token(speculator: Any) -> None:
    drafts = propose(speculator, BATCH)
    assert drafts.shape == (4, MAX_DRAFTS)
    token = 5
    for step in range(MAX_DRAFTS):
        seen = speculator.model.steps[step]
        assert seen["tokens"][0] == token and seen["positions"][0] == 6 + step and seen["seq_lens"][0] == 7 + step
        token += 6 + step
        assert drafts[0, step] == token
        assert speculator.draft_logits[4, step].argmax() == token  # what the rejection sampler will be given
    assert speculator.model.steps[0]["query_start_loc"] == [0, 1, 2, 3, 4, 4, 4]


def test_v2_draws_with_each_requests_temperature_and_seed_at_its_position(speculator: Any) -> None:
    """vLLM keys a draw by the position before the drawn token; the rejection sampler reads the temperature again."""
    propose(speculator, BATCH)
    starts = {4: 6, 1: 7, 0: 0, 2: 23}
    assert speculator.draws == [
        {request: (request / 4, request + 100, start + step) for request, start in starts.items()}
        for step in range(MAX_DRAFTS)
    ]


def test_v2_writes_only_slots_allocated_to_the_request(speculator: Any) -> None:
    """Stale block ids past the allocation once let a drafter write into another request's keys and values."""
    propose(speculator, BATCH)
    slots = [seen["slots"][:4] for seen in speculator.model.steps]
    assert [row[0] for row in slots] == [11 * 4 + 2, 11 * 4 + 3, 12 * 4]
    assert [row[1] for row in slots] == [21 * 4 + 3, -1, -1]
    assert [row[2] for row in slots] == [-1, -1, -1]
    assert [row[3] for row in slots] == [45 * 4 + 3, -1, -1]
    for seen in speculator.model.steps:
        assert max(seen["positions"]) < MAX_LEN and max(seen["seq_lens"]) <= MAX_LEN
        assert all(length >= 1 for length in seen["seq_lens"][:4]) and seen["seq_lens"][4:] == [0, 0]


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_v2_follows_the_draft_length_of_the_step(speculator: Any, gamma: int) -> None:
    propose(speculator, BATCH, num_speculative_tokens=3)
    speculator.model.steps.clear()
    drafts = propose(speculator, BATCH, num_speculative_tokens=gamma)
    assert len(speculator.model.steps) == gamma
    assert drafts[0, :gamma].tolist() == [11, 18, 26][:gamma]


def test_v2_drafts_as_many_as_the_scheduler_said_before(speculator: Any) -> None:
    """Before vLLM 0.32 `propose` is not told; a warm-up's step was not scheduled by selfspec and says nothing."""
    runner = SimpleNamespace(speculator=speculator)
    scheduled = SimpleNamespace(num_spec_tokens_to_schedule=2, selfspec_light=None)
    assert speculator_module.execute_model(lambda *arguments: arguments, runner, scheduled, 5) == (runner, scheduled, 5)
    speculator_module.execute_model(lambda *_: None, runner, SimpleNamespace(num_spec_tokens_to_schedule=0))
    drafts = propose(speculator, BATCH)
    assert len(speculator.model.steps) == 2 and drafts[0, :2].tolist() == [11, 18]
    speculator.model.steps.clear()
    propose(speculator, BATCH, dummy_run=True)
    assert len(speculator.model.steps) == MAX_DRAFTS


def test_v2_without_drafts_touches_nothing(speculator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_begin", "_copy_request_inputs", "_place", "_forward_and_sample"):
        monkeypatch.setattr(speculator, name, never_called)
    monkeypatch.setattr(speculator_module, "dispatch_cg_and_sync_dp", never_called)
    monkeypatch.setattr(speculator._tap, "refresh", never_called)
    assert propose(speculator, BATCH, num_speculative_tokens=0).shape == (4, MAX_DRAFTS)
    assert not speculator.model.steps


def test_v2_dummy_runs_write_no_kv_and_keep_no_logits(speculator: Any) -> None:
    speculator.draft_logits.fill_(-7)
    propose(speculator, BATCH, dummy_run=True)
    assert all(set(seen["slots"][:4]) == {-1} for seen in speculator.model.steps)
    assert (speculator.draft_logits == -7).all()


@pytest.mark.skipif(older_than("0.30"), reason="ranks agree on no number of requests there")
def test_v2_dummy_runs_draft_for_no_more_requests_than_any_rank_has(
    speculator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dummy run is padded to a graph of the target; since vLLM 0.33 the number that ranks agree on is not."""
    seen = []

    name = "dp_sync" if older_than("0.32") else "dp_sync_state"

    def dispatch(manager: Any, num_reqs: int, num_tokens: int, **arguments: Any) -> Any:
        seen.append((num_reqs, num_tokens, arguments[name].num_tokens_across_dp.tolist()))
        desc = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=num_tokens, num_reqs=num_reqs)
        return desc, arguments[name]

    monkeypatch.setattr(speculator_module, "dispatch_cg_and_sync_dp", dispatch)
    sync = DPSyncState(
        num_tokens_across_dp=torch.tensor([8, 8]), uniform_token_count=4, eager=False, num_reqs=len(BATCH) - 2
    )
    propose(speculator, BATCH, dummy_run=True, **{name: sync})
    assert seen == [(2, 2, [2, 2])]
    assert all(len(step["tokens"]) == 2 for step in speculator.model.steps)


def test_v2_profile_run_needs_no_kv_cache_and_compiles_for_more_than_one_row(speculator: Any) -> None:
    speculator._manager = None  # as before the KV cache is there
    propose(speculator, BATCH[:1], dummy_run=True, skip_attn_for_dummy_run=True, is_profile=True)
    assert [len(seen["tokens"]) for seen in speculator.model.steps] == [2] * MAX_DRAFTS
    assert not speculator.builds


@pytest.mark.parametrize(("updates", "builds"), [(True, [(4, 3, 24)]), (False, [(4, 1, 24), (4, 2, 24), (4, 3, 24)])])
def test_v2_attention_metadata_is_built_once_where_the_backend_can_refresh_it(
    speculator: Any, updates: bool, builds: list[tuple[int, int, int]]
) -> None:
    speculator._updates_metadata = updates
    propose(speculator, BATCH)
    assert speculator.builds == builds


def test_v2_replays_one_graph_per_draft(speculator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is replaced by the very function that it would hold, with two rows of padding."""
    desc = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=6, num_reqs=6, uniform_token_count=1)
    manager = SimpleNamespace(replays=0)

    def replay(got: Any) -> None:
        assert got is desc
        manager.replays += 1
        slots = {"layer": speculator.block_tables.slot_mappings[0]}
        speculator._whole_step(6, 6, {"layer": None}, slots, None, CUDAGraphMode.NONE)

    manager.run_fullgraph = replay
    speculator._manager = manager
    monkeypatch.setattr(speculator_module, "dispatch_cg_and_sync_dp", lambda *_, **__: (desc, None))
    eager = propose(speculator, BATCH)[:4].clone()
    assert manager.replays == MAX_DRAFTS and not speculator.builds
    assert eager[0].tolist() == [11, 18, 26]
    for seen in speculator.model.steps:
        assert seen["slots"][4:6] == [-1, -1] and seen["seq_lens"][4:] == [0, 0]
        assert seen["tokens"][4:6] == [0, 0]


def test_v2_no_host_read_of_the_device_between_drafts(speculator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device a tensor has no values to read, so any read of one would raise."""
    batch = SimpleNamespace(num_reqs=4, idx_mapping=torch.arange(4))
    speculator.block_tables = fake_block_tables([request["blocks"] for request in BATCH], 6)
    speculator._start, speculator._limit, speculator._step, speculator.idx_mapping = (
        tensor.to("meta") for tensor in (speculator._start, speculator._limit, speculator._step, speculator.idx_mapping)
    )
    for name in ("input_ids", "positions", "seq_lens", "query_start_loc"):
        setattr(speculator.input_buffers, name, getattr(speculator.input_buffers, name).to("meta"))
    speculator.draft_tokens = speculator.draft_tokens.to("meta")
    tables = speculator.block_tables
    tables.input_block_tables = [tables.input_block_tables[0].to("meta")]
    tables.slot_mappings = tables.slot_mappings.to("meta")
    speculator.model = lambda input_ids, positions: torch.empty(len(input_ids), 8, device="meta")
    monkeypatch.setattr(speculator, "sample_draft", lambda hidden, *_: hidden[:, 0].long())
    speculator._run_without_graph(
        BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=4, num_reqs=4),
        batch.num_reqs,
        MAX_DRAFTS,
        torch.ones(4, dtype=torch.int32),
        None,
        skip_attn=False,
    )
    assert len(speculator.builds) == 1


def test_v2_keeps_vllms_interface() -> None:
    for name in (
        "propose",
        "set_attn",
        "load_draft_model",
        "init_cudagraph_manager",
        "capture",
    ):
        ours = list(inspect.signature(getattr(speculator_module.SelfDraftSpeculator, name)).parameters)
        theirs = list(inspect.signature(getattr(DraftModelSpeculator, name)).parameters)
        if name == "propose":  # its arguments before vLLM 0.32 come after those since
            if older_than("0.32"):
                ours = ["dp_sync" if argument == "dp_sync_state" else argument for argument in ours]
            ours = ours[: len(theirs)]
        assert ours == theirs, name
    if older_than("0.32"):
        vllms = import_module("vllm.v1.worker.gpu.spec_decode.autoregressive.speculator").AutoRegressiveSpeculator
    else:
        vllms = import_module(
            "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
        ).TargetDependentARSpeculator
    whole_step = list(inspect.signature(speculator_module.SelfDraftSpeculator._whole_step).parameters)
    captured = list(inspect.signature(vllms._generate_draft).parameters)
    if older_than("0.32"):
        whole_step.remove("num_speculative_steps")
    assert len(whole_step) == len(captured) and (older_than("0.32") or whole_step[-1] == captured[-1])
    seam = inspect.signature(v2_runner.init_speculator).parameters
    assert list(seam) == ["vllm_config", "device"] + ["req_states"] * (not older_than("0.32"))


def test_v2_is_not_refused_for_want_of_draft_models(vllm_config: VllmConfig) -> None:
    """Before vLLM 0.31 there were none on it; what else it lacks still counts."""
    lacking = ["speculative method 'draft_model'", "sequence parallelism"]
    assert unsupported_on_v2(lambda config: lacking, vllm_config) == ["sequence parallelism"]
    other = SimpleNamespace(speculative_config=SimpleNamespace(method="draft_model"))
    assert unsupported_on_v2(lambda config: lacking, other) == lacking


def test_v2_leaves_other_configs_to_vllm(vllm_config: VllmConfig) -> None:
    other = SimpleNamespace(speculative_config=None)
    made = speculator_module.init_speculator(lambda *arguments: arguments, other, "device", "states")
    assert made == (other, "device", "states")


def test_v2_refuses_more_than_one_kv_cache_group(speculator: Any) -> None:
    with pytest.raises(ConfigError, match="one KV-cache group"):
        speculator.set_attn(None, SimpleNamespace(kv_cache_groups=[1, 2]), None, None, None)


@pytest.mark.parametrize("field", ["enable_lora", "decode_context_parallel_size", "prefill_context_parallel_size"])
def test_v2_refuses_what_its_draft_steps_do_not_have(field: str, vllm_config: VllmConfig) -> None:
    if field == "enable_lora":
        vllm_config.lora_config = SimpleNamespace()
    else:
        setattr(vllm_config.parallel_config, field, 2)
    with pytest.raises(ConfigError, match=field):
        speculator_module.init_speculator(never_called, vllm_config, torch.device("cpu"), None)


def test_v2_captures_graphs_only_where_metadata_can_be_refreshed(
    speculator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    monkeypatch.setattr(
        speculator_module,
        "SpeculatorCudaGraphManager",
        lambda config, device, mode, decode_query_len: modes.append(mode),
    )
    for updates, mode in (
        (True, CUDAGraphMode.FULL_AND_PIECEWISE),
        (False, CUDAGraphMode.FULL),
        (True, CUDAGraphMode.PIECEWISE),
    ):
        speculator._updates_metadata = updates
        speculator.init_cudagraph_manager(mode)
    assert modes == [CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.NONE, CUDAGraphMode.NONE]


@pytest.fixture
def graph_manager(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], CudaGraphManager]:
    """`graph_manager(selfspec)`: the target's, with or without selfspec, as if its graphs were captured."""
    alone = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.get_pp_group", lambda: alone)
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    vllm_config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    vllm_config.compilation_config.max_cudagraph_capture_size = 512
    vllm_config.scheduler_config.max_num_seqs = 256
    settings = vllm_config.speculative_config.selfspec
    settings = settings.model_copy(update={"control": settings.control.model_copy(update={"mode": "adaptive"})})
    adaptive = replace(vllm_config.speculative_config, selfspec=settings)
    adaptive.num_speculative_tokens_per_batch_size = every_draft_length(MAX_DRAFTS)

    def make(selfspec: bool) -> CudaGraphManager:
        vllm_config.speculative_config = adaptive if selfspec else None
        queries = 1 + MAX_DRAFTS if selfspec else 1
        manager = CudaGraphManager(vllm_config, torch.device("cpu"), CUDAGraphMode.FULL_AND_PIECEWISE, queries)
        manager._graphs_captured = True
        return manager

    monkeypatch.setattr(CudaGraphManager, "_init_candidates", CudaGraphManager._init_candidates)  # to be put back
    next(seam for seam in IN_V2_WORKERS if seam.target.endswith("_init_candidates")).apply()
    return make


def test_v2_every_decoding_batch_has_a_graph_of_the_whole_target(
    graph_manager: Callable[[bool], CudaGraphManager],
) -> None:
    plain, manager = graph_manager(False), graph_manager(True)
    for batch in range(1, 257):
        assert manager.dispatch(batch, batch, 1, 0, 1) == plain.dispatch(batch, batch, 1, 0, 1)
        for queries in range(2, MAX_DRAFTS + 2):
            graph = manager.dispatch(batch, queries * batch, queries, 0, queries)
            if queries * batch <= 192 or (batch in WITH_DRAFTS and queries * batch <= MOST_TOKENS):
                assert graph.cg_mode == CUDAGraphMode.FULL
            elif queries * batch <= 512:
                assert graph.cg_mode in (CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE)
            if graph.cg_mode == CUDAGraphMode.FULL:
                assert graph.uniform_token_count == queries
                assert batch <= graph.num_reqs <= 1.5 * batch
                assert graph.num_tokens == queries * graph.num_reqs
                assert graph in manager._capture_descs[CUDAGraphMode.FULL]
    # Requests with drafts of different lengths, or with prompts beside them, run in pieces.
    assert manager.dispatch(3, 12, None, 0).cg_mode == CUDAGraphMode.PIECEWISE
    assert manager.dispatch(3, 500, None, 0) == plain.dispatch(3, 500, None, 0)


@pytest.mark.parametrize(("sizes", "requests"), [([1, 2, 4], 256), ([1, 2, 4, 8, 16, 24], 20), ([8], 3)])
def test_v2_graphs_stay_within_what_the_user_allows(sizes: list[int], requests: int) -> None:
    batches = decode_batches(sizes, requests, 3)
    assert set(batches) == {1, 2, 3, 4}
    for queries, counts in batches.items():
        assert counts == sorted(counts)
        assert all(count <= requests and queries * count <= max(sizes) for count in counts)
    assert batches[1] == [size for size in sizes if size <= requests]
    assert batches[2] == {256: [1, 2], 20: [1, 2, 3, 4, 5, 6, 7, 8, 12], 3: [1, 2, 3]}[requests]


@pytest.mark.parametrize("most", [1, 3, 7])
def test_the_table_of_draft_lengths_holds_every_length(most: int) -> None:
    lookup = build_dynamic_sd_schedule_lookup(every_draft_length(most), 128, most)
    assert set(lookup[1:]) == set(range(most + 1))


@pytest.mark.parametrize(
    ("asked", "cuda", "lora", "result"),
    [
        (None, True, False, None),  # vLLM chooses
        (None, True, True, "0"),
        ("1", True, True, "1"),  # refused later, in one sentence
        ("0", True, False, "0"),
        (None, False, False, "0"),
        ("1", False, False, "1"),
    ],
)
def test_the_users_choice_of_a_runner_stands(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, cuda: bool, lora: bool, result: str | None
) -> None:
    monkeypatch.setenv(RUNNER_VARIABLE, "placeholder")
    monkeypatch.delenv(RUNNER_VARIABLE) if asked is None else monkeypatch.setenv(RUNNER_VARIABLE, asked)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: cuda)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: not cuda)
    choose_runner(lora)
    assert os.environ.get(RUNNER_VARIABLE) == result


# benchmarks/gpu/run_all.py: what of it needs neither a GPU nor an engine.


def test_the_shapes_have_their_models_sizes(script: Any, tmp_path: Path) -> None:
    published = {
        "qwen2.5-7b": 7.615e9,
        "llama-3.1-8b": 8.030e9,
        "qwen2.5-14b": 14.770e9,
        "qwen3-30b-a3b": 30.532e9,
    }  # parameters, embedding included
    for name, parameters in published.items():
        shape = json.loads((script.write_shape(name, tmp_path) / "config.json").read_text())
        embedding = shape["vocab_size"] * shape["hidden_size"]
        assert script.parameter_bytes(shape, 1) + embedding == pytest.approx(parameters, rel=0.001)


def test_the_products_are_those_of_the_shape(script: Any) -> None:
    for name, shape in script.SHAPES.items():
        if "num_experts" in shape:
            assert set(script.linear_layers(shape)) == {"qkv", "o", "lm_head"}
            continue
        sizes = {layer: outputs * inputs for layer, (outputs, inputs) in script.linear_layers(shape).items()}
        assert (
            script.parameter_bytes(shape, 1)
            == shape["num_hidden_layers"] * (sum(sizes.values()) - sizes["lm_head"]) + sizes["lm_head"]
        ), name


def test_a_job_that_is_ended_keeps_what_it_has(script: Any, tmp_path: Path) -> None:
    """It has a second, in which no engine starts."""
    out = tmp_path / "out"
    run = script.Run(script.parse_arguments(["--out", str(out), "--device", "cpu", "--tiny", "--minutes", "0.02"]))
    (run.scratch / "0.json").write_text('{"rows": [1]}')  # as if the job had written it
    assert run.job("products", shape="tiny")["rows"] == [1]
    assert run.job("products", shape="tiny") == {"error": "not run: --minutes are over"}
    recorded = json.loads((out / "results.json").read_text())["jobs"]
    assert [job["error"] for job in recorded] == ["ended: --minutes are over", "not run: --minutes are over"]
    assert "products shape=tiny" in (out / "jobs.log").read_text()
    assert {path.name for path in out.iterdir()} == {"results.json", "jobs.log"}


def test_component_times_are_told_apart(script: Any, tmp_path: Path) -> None:
    target, draft, verify = 0.010, 0.004, 0.012

    def step(verified: int, drafted: int, seconds: float) -> StepObservation:
        return StepObservation(seconds, 2, 100, verified, drafted)

    steps = [step(0, 0, target), step(0, 0, target), step(0, 3, target + 3 * draft), step(3, 0, verify)]
    rows = script.sweep_rows("tiny", 2, [*steps, step(3, 3, verify + 3 * draft)])
    found = {row["mode"]: (row["gamma"], row["median_ms"]) for row in rows}
    assert found == {
        "target_decode": (0, pytest.approx(10)),
        "drafter_decode": (3, pytest.approx(4)),
        "target_verify": (3, pytest.approx(12)),
    }
    script.write_csv(tmp_path / "sweep.csv", rows)
    points, model = read_sweep(tmp_path / "sweep.csv")
    assert model == "tiny" and sorted(point.component for point in points) == ["draft", "target", "verify"]
    header = (tmp_path / "sweep.csv").read_text().splitlines()[0]
    assert header == "model,batch,seq,gamma,mode,mean_ms,median_ms,std_ms,min_ms,max_ms,n_samples"


def test_a_sweep_captures_what_it_measures(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_graphs, "decode_batches", decode_batches)  # to be put back
    script.capture_only_what_is_measured([1, 2, 4, 8, 16, 32, 64, 128], 3)
    captured = verify_graphs.decode_batches([1, 2, 4, *range(8, 513, 8)], 128, 3)
    assert captured == {1: [1, 2, 4, 8, 16, 32, 64, 128], 4: [1, 2, 4, 8, 16, 32, 64]}


def test_a_batch_that_was_never_decoded_plainly_gives_no_rows(script: Any) -> None:
    only = StepObservation(1.0, num_decode=1, mean_context=9, num_verified=0, num_drafted=3)
    assert script.sweep_rows("tiny", 1, [only]) == []


def test_answer_lengths_have_a_long_tail(script: Any) -> None:
    lengths = script.answer_lengths(1000, 8192)
    assert max(lengths) == 8192 and min(lengths) >= 1
    assert 900 < sorted(lengths)[500] < 1150
    assert lengths == script.answer_lengths(1000, 8192)


def test_first_difference_tells_how_near_a_tie_was(script: Any) -> None:
    plain = {"tokens": [1, 2, 3], "gaps": [0.5, 1e-5, 0.5]}
    assert script.first_difference(plain, {"tokens": [1, 2, 3]}) is None
    found = script.first_difference(plain, {"tokens": [1, 9, 3]})
    assert found == {"place": 1, "plain": 2, "other": 9, "gap": 1e-5}


@pytest.mark.parametrize(
    "argv",
    [["--gammas", "0"], ["--stages", "nothing"], ["--models", "gpt"], ["--acceptance", "1.5"], ["--device", "cpu"]],
)
def test_wrong_options_are_refused(script: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.parse_arguments(["--out", "x", *argv])
    assert caught.value.code == 2 and argv[0].lstrip("-") in capsys.readouterr().err


def test_vllm_is_packed_with_the_kernels_that_hopper_needs(script: Any, tmp_path: Path) -> None:
    site = tmp_path / "site"
    random = os.urandom(4000)
    written = {
        "vllm/inner/module.py": b"x = 1\n" * 5000,
        "vllm/_C_stable_libtorch.abi3.so": random,
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": random,
        "vllm-0.33.0.dist-info/METADATA": b"Name: vllm\n",
        "orjson/__init__.py": b"",
    }
    left_out = {
        "vllm/vllm-rs": random,
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": random,
        "vllm/__pycache__/module.pyc": random,
        "vllm/third_party/deep_gemm/__init__.py": b"",
    }
    for name, content in {**written, **left_out}.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
    parts = script.pack(site, tmp_path / "pieces", piece_mib=0.002)
    assert len(parts) > 1 and all(part.stat().st_size <= 0.002 * 2**20 for part in parts)
    (tmp_path / "site.zip").write_bytes(b"".join(part.read_bytes() for part in parts))
    with zipfile.ZipFile(tmp_path / "site.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == written


def test_the_plugin_is_found_where_only_its_source_is(script: Any, tmp_path: Path) -> None:
    (found,) = distributions(path=[str(script.write_metadata(tmp_path / "metadata"))])
    (plugin,) = found.entry_points.select(group="vllm.general_plugins")
    assert (found.name, plugin.name) == ("vllm-selfspec", "selfspec")
    assert plugin.load() is register
