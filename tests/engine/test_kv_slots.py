"""The drafter writes only KV slots that the scheduler gave to the request, and the target rewrites them before reading.

An inspector stands around `propose()`. Before it, every slot that holds no valid token is poisoned and every stale
block-table entry points at a canary block. After it, nothing may have changed but the slots behind the last token of
the requests that sampled, and those are overwritten with noise: whatever the target read of them would show in the
text, and whatever it failed to write still holds the noise when the next proposal looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import interpreted_triton
import pytest
import torch
from engines import (
    BLOCK,
    Job,
    drafter_of,
    drafts_wanted,
    drive,
    engine,
    greedy,
    random_lengths,
    random_prompt,
    runner_of,
    scheduler_of,
    texts,
    watch,
)
from vllm import LLM, RequestOutput

from vllm_selfspec.control.policy import StepState
from vllm_selfspec.drafter import proposer
from vllm_selfspec.speculative_config import REQUEST_CAP

RECORDED = interpreted_triton.on_runner_v2()
"""On runner V2, batches of one, two and three draft by replayed graphs, the first with a row of padding."""
if RECORDED:
    from recorded_graph import RecordedGraph, capture, recorded_graphs

    from vllm_selfspec.drafter import speculator
LAYERS = 1 if RECORDED else 4  # interpreted attention is slow

MAX_MODEL_LEN = 5 * BLOCK
LONGEST = 8
POISON = 12345.0
NOISE = -54321.0
SERVING: dict[str, Any] = {
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 44,
    "num_gpu_blocks_override": 16,
}


def jobs() -> list[Job]:
    """Chunked prefill beside decoding, block boundaries, and requests that draft into max_model_len."""
    lengths = [(BLOCK - 3, 40), (3 * BLOCK, 30), (MAX_MODEL_LEN - 20, 100), (BLOCK, 70), (4 * BLOCK - 1, 100), (5, 90)]
    return [
        Job(random_prompt(length, 40 + length), greedy(count), arrival=2 * i)
        for i, (length, count) in enumerate(lengths)
    ]


def unguarded_slots(
    start: torch.Tensor, limit: torch.Tensor, block_table: torch.Tensor, block_size: int, num_draft_tokens: int
) -> torch.Tensor:
    """`draft_slots` without its guard: trusts the block table at every position."""
    positions = start + torch.arange(num_draft_tokens, device=start.device).unsqueeze(1)
    blocks = (positions // block_size).clamp_(max=block_table.shape[1] - 1)
    return block_table.gather(1, blocks.t()).t().long() * block_size + positions % block_size


def elements_of(cache: torch.Tensor) -> torch.Tensor:
    """[blocks, elements of a block] view of a layer's cache, in the order in which they lie in memory."""
    order = sorted(range(1, cache.dim()), key=cache.stride, reverse=True)
    return cache.permute(0, *order).view(cache.shape[0], -1)


class Row(NamedTuple):
    """One request of a proposal: tokens whose keys and values are valid, whether it sampled, its block-table row.

    The row is on the device; V1 fills it from one on the host, which is the same memory on a CPU.
    """

    request_id: str
    length: int
    sampled: bool
    table: torch.Tensor
    num_blocks: int


def rows_of_v1(runner: Any, inputs: dict[str, Any]) -> list[Row]:
    """The rows of a call of runner V1's `propose`."""
    batch, table = runner.input_batch, runner.input_batch.block_table[0]
    device_table = table.get_device_tensor(batch.num_reqs)
    lengths = inputs["common_attn_metadata"].seq_lens
    if inputs["num_rejected_tokens_gpu"] is not None:
        lengths = lengths - inputs["num_rejected_tokens_gpu"]
    sampled = ~runner.discard_request_mask.np
    return [
        Row(request_id, int(lengths[row]), bool(sampled[row]), device_table[row], table.num_blocks_per_row[row])
        for row, request_id in enumerate(batch.req_ids)
    ]


def rows_of_v2(runner: Any, inputs: dict[str, Any]) -> list[Row]:
    """The rows of a call of runner V2's `propose`."""
    batch, tables = inputs["input_batch"], runner.block_tables
    lengths, sampled = batch.seq_lens - inputs["num_rejected"], inputs["num_sampled"] > 0
    return [
        Row(
            batch.req_ids[row],
            int(lengths[row]),
            bool(sampled[row]),
            tables.input_block_tables[0][row],
            tables.num_blocks.np[0, batch.idx_mapping_np[row]],
        )
        for row in range(batch.num_reqs)
    ]


@contextmanager
def counts_that_have_changed(runner: Any) -> Iterator[None]:
    """Runner V2's numbers of blocks as a step finds them that comes so late that the host has gone on."""
    if not hasattr(runner, "block_tables"):
        yield
        return
    counts = runner.block_tables.num_blocks.gpu
    kept = counts.clone()
    counts.fill_(MAX_MODEL_LEN)
    yield
    counts.copy_(kept)


@dataclass
class Inspector:
    """Poisons the KV cache around every proposal and writes down what it should not have done.

    Attributes:
        llm: an in-process engine without prefix caching.
        canary: a block that no request ever gets.
        proposals: proposals inspected that drafted anything.
        padded: rows of these that were not allowed to write at all.
        written: slots that the drafter wrote.
        canary_hits: proposals that wrote into the canary block.
        strays: proposals that wrote into any other slot that was not theirs.
        unwritten: proposals that found a valid token's slot which the target had not written.
    """

    llm: LLM
    canary: int = 0
    proposals: int = 0
    padded: int = 0
    written: int = 0
    canary_hits: int = 0
    strays: int = 0
    unwritten: int = 0
    caches: list[torch.Tensor] = field(default_factory=list)
    offsets: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        runner = runner_of(self.llm)
        self.canary = scheduler_of(self.llm).kv_cache_manager.block_pool.get_new_blocks(1)[0].block_id
        self.caches = [elements_of(cache) for cache in runner.kv_caches]
        # How a kernel lays out keys and values inside a block is its own affair: let it write every slot's offset.
        layer = next(iter(runner.compilation_config.static_forward_context.values()))
        block = torch.full_like(runner.kv_caches[0][:1], -1.0)
        slots = torch.arange(BLOCK, device=block.device)
        values = slots.float()[:, None, None].expand(-1, block.shape[1], block.shape[3] // 2).contiguous()
        layer.impl.do_kv_cache_update(layer, values, values.clone(), block, slots)
        self.offsets = elements_of(block)[0].long()  # [elements of a block] the slot that each belongs to
        assert (self.offsets.bincount(minlength=BLOCK) == block.numel() // BLOCK).all()

    def fill(self, mask: torch.Tensor, value: float) -> None:
        """Overwrite the slots of mask [blocks, block_size] in every layer."""
        for cache in self.caches:
            cache[mask[:, self.offsets]] = value

    def slots_with(self, elements: torch.Tensor) -> torch.Tensor:
        """[blocks, block_size] slots that hold any of the elements [blocks, elements of a block]."""
        found = torch.zeros(elements.shape[0], BLOCK, device=elements.device)
        return found.index_add_(1, self.offsets, elements.float()) > 0

    def propose(self, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The drafter's `propose` under inspection."""
        runner, scheduler = runner_of(self.llm), scheduler_of(self.llm)
        inputs = inspect.signature(original).bind(*args, **kwargs).arguments
        gamma = drafts_wanted(drafter_of(self.llm), inputs)
        valid = torch.zeros(
            self.caches[0].shape[0], BLOCK, dtype=torch.bool
        )  # slots that hold a token's keys and values
        open_ = torch.zeros_like(valid)  # slots that this proposal may write
        for row in (rows_of_v2 if "input_batch" in inputs else rows_of_v1)(runner, inputs):
            # What the scheduler gave, not what the worker believes.
            blocks = scheduler.kv_cache_manager.get_block_ids(row.request_id)[0]
            assert row.num_blocks == len(blocks)
            row.table[len(blocks) :] = self.canary
            end = min(row.length + gamma, len(blocks) * BLOCK, MAX_MODEL_LEN) if row.sampled else row.length
            for position in range(end):
                which = valid if position < row.length else open_
                which[blocks[position // BLOCK], position % BLOCK] = True
            self.padded += not row.sampled
        valid, open_ = (slots.to(self.offsets.device) for slots in (valid, open_))
        self.unwritten += any(
            (self.slots_with((cache == POISON) | (cache == NOISE)) & valid).any() for cache in self.caches
        )
        self.fill(~valid, POISON)
        before = [cache.clone() for cache in self.caches]
        with counts_that_have_changed(runner):
            drafts = original(*args, **kwargs)
        changed = torch.zeros_like(valid)
        for cache, old in zip(self.caches, before, strict=True):
            changed |= self.slots_with(cache != old)
        self.proposals += gamma > 0
        self.written += int(changed.sum())
        self.canary_hits += bool(changed[self.canary].any())
        changed[self.canary] = False
        self.strays += bool((changed & ~open_).any())
        self.fill(changed & open_, NOISE)
        return drafts


@pytest.fixture(scope="module")
def expected(tiny: Callable[..., str]) -> list[RequestOutput | None]:
    with engine(tiny("llama", num_hidden_layers=LAYERS), **SERVING) as llm:
        return drive(llm, jobs())


@pytest.fixture(scope="module", params=["int8"] if RECORDED else ["native", "int8"])
def drafting(
    expected: list[RequestOutput | None], tiny: Callable[..., str], request: pytest.FixtureRequest
) -> Iterator[LLM]:
    """An engine whose slots are inspected; asks for `expected` because two engines cannot live in one process."""
    drafter = {"weights": request.param, "lm_head": request.param}
    settings = {"num_speculative_tokens": LONGEST, "drafter": drafter, "control": {"mode": "fixed"}}
    graphs = recorded_graphs() if RECORDED else nullcontext()
    with graphs, engine(tiny("llama", num_hidden_layers=LAYERS), settings, **SERVING) as llm:
        yield llm


@pytest.fixture
def inspector(drafting: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Inspector]:
    """An inspector of the engine's proposals for one test."""
    inspecting = Inspector(drafting)
    drafter = drafter_of(drafting)
    if RECORDED:
        capture(drafting)
    original = drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda *args, **kwargs: inspecting.propose(original, *args, **kwargs))
    yield inspecting
    pool = scheduler_of(drafting).kv_cache_manager.block_pool
    pool.free_blocks([pool.blocks[inspecting.canary]])


@pytest.mark.parametrize("lookahead", [LONGEST, 0], ids=["lookahead", "no_lookahead"])
def test_drafter_keeps_to_allocated_slots(
    lookahead: int,
    drafting: LLM,
    inspector: Inspector,
    expected: list[RequestOutput | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no lookahead slots the drafts run past the allocated blocks at every block boundary."""
    monkeypatch.setattr(scheduler_of(drafting), "num_lookahead_tokens", lookahead)
    seen = watch(drafting, random_lengths(7, LONGEST))
    assert texts(drive(drafting, jobs())) == texts(expected)
    assert inspector.canary_hits == inspector.strays == inspector.unwritten == 0
    assert inspector.proposals > 20 and inspector.padded > 3 and inspector.written > 200
    # Without lookahead slots the same requests fit into the cache.
    assert seen.preemptions > 0 or not lookahead
    if lookahead and drafter_of(drafting)._weights == "native":
        assert seen.acceptance == 1.0
    if RECORDED:
        assert RecordedGraph.replays > 50


def test_no_drafts_are_no_work(
    drafting: LLM, expected: list[RequestOutput | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """γ = 0 is plain decoding: nothing of the drafter is touched, and no refresh is made."""
    drafter, proposals = drafter_of(drafting), []
    propose = drafter.propose

    def touched(*_: Any, **__: Any) -> None:
        pytest.fail("the drafter was touched")

    def proposed(*args: Any, **kwargs: Any) -> torch.Tensor:
        proposals.append(propose(*args, **kwargs))
        return proposals[-1]

    prepares = "_begin" if hasattr(drafter, "_begin") else "_allocated_tokens"
    for owner, name in (
        (drafter, prepares),
        (drafter._tap, "refresh"),
        (drafter.model, "forward"),
        (drafter.model, "compute_logits"),
    ):
        monkeypatch.setattr(owner, name, touched)
    monkeypatch.setattr(drafter, "propose", proposed)
    seen = watch(drafting, lambda: 0)
    assert texts(drive(drafting, jobs()[:3])) == texts(expected[:3])
    assert seen.drafted == 0 and len(proposals) > 20


def test_a_request_is_drafted_no_more_than_it_allows(
    drafting: LLM, expected: list[RequestOutput | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that allow all four drafts, two and none, in one batch."""
    scheduler, limits = scheduler_of(drafting), [None, 2, 0]
    schedule, state_of = scheduler.schedule, scheduler._state
    verified: dict[int, set[int]] = {number: set() for number in range(len(limits))}
    states: list[StepState] = []

    def scheduled(*args: Any) -> Any:
        output = schedule(*args)
        for request_id, drafts in output.scheduled_spec_decode_tokens.items():
            verified[int(request_id.split("-")[0])].add(len(drafts))
        return output

    def state(output: Any) -> StepState:
        states.append(state_of(output))
        return states[-1]

    monkeypatch.setattr(scheduler, "schedule", scheduled)
    monkeypatch.setattr(scheduler, "_state", state)
    limited = jobs()[:3]
    for job, limit in zip(limited, limits, strict=True):
        job.params.extra_args = None if limit is None else {REQUEST_CAP: limit}
    watch(drafting, lambda: 4)
    assert texts(drive(drafting, limited)) == texts(expected[:3])
    assert [max(counts, default=0) for counts in verified.values()] == [4, 2, 0]
    assert [0, 2] in [sorted(state.draft_caps) for state in states], "the policy must know of them"


@pytest.mark.parametrize("lookahead", [LONGEST, 0], ids=["lookahead", "no_lookahead"])
def test_inspector_sees_a_missing_guard(
    lookahead: int, drafting: LLM, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_of(drafting), "num_lookahead_tokens", lookahead)
    for module in (proposer, *([speculator] if RECORDED else [])):
        monkeypatch.setattr(module, "draft_slots", unguarded_slots)
    if RECORDED:
        capture(drafting)  # what the graphs hold is the guarded step
    watch(drafting, random_lengths(7, LONGEST))
    drive(drafting, jobs())
    assert inspector.canary_hits > 0
    assert inspector.strays > 0


def test_inspector_sees_a_target_that_does_not_rewrite(
    drafting: LLM, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check for unwritten slots finds a drafter that hides its slots from the target's next write."""
    runner = runner_of(drafting)
    tables, name = (
        (runner.block_tables, "compute_slot_mappings")
        if hasattr(runner, "block_tables")
        else (runner.input_batch.block_table[0], "compute_slot_mapping")
    )
    compute = getattr(tables, name)

    def skip_last(*args: Any, **kwargs: Any) -> Any:
        mapping = compute(*args, **kwargs)
        if mapping is None:
            for buffer in (tables.slot_mapping.np, tables.slot_mapping.gpu):  # the CPU fills one, CUDA the other
                buffer[1:3] = -1
        else:
            mapping[0, 1:3] = -1
        return mapping

    monkeypatch.setattr(tables, name, skip_last)
    watch(drafting, lambda: 4)
    drive(drafting, jobs())
    assert inspector.unwritten > 0


@pytest.mark.parametrize("block_size", [16, 32])
def test_draft_slots(block_size: int) -> None:
    """Slot by slot against the definition, with requests at every place relative to their limit."""
    table = torch.tensor([[7, 3, 9, 99], [5, 99, 99, 99], [1, 2, 4, 6], [8, 99, 99, 99]], dtype=torch.int32)
    limit = torch.tensor([3 * block_size, block_size, 4 * block_size - 5, 0])
    start = torch.tensor([2 * block_size - 2, block_size - 1, 4 * block_size - 7, 0])
    slots = proposer.draft_slots(start, limit, table, block_size, 6)
    for row in range(4):
        for step in range(6):
            position = int(start[row]) + step
            allowed = position < limit[row]
            block = int(table[row, position // block_size]) if allowed else 99
            assert slots[step, row] == (block * block_size + position % block_size if allowed else -1)
