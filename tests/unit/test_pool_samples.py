"""The pool with workers that have no engine: streaming, faults, weights. No Ray, vLLM or torch."""

import asyncio
import contextlib
import json
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_selfspec.errors import EngineError, write_whole
from vllm_selfspec.rollout import (
    DummyWorker,
    GenerateRequest,
    InvalidRequestError,
    OutputFullError,
    PoolFailedError,
    RolloutError,
    RolloutPool,
    RolloutWorker,
    Sample,
    SampleWriter,
    WeightUpdateError,
    WorkerDeadError,
    read_samples,
    write_samples,
)
from vllm_selfspec.rollout.types import WorkerInfo
from vllm_selfspec.rollout.weights import check_finite, read_index, weight_files

PARAMS = {"max_tokens": 8}


class Fleet:
    """Makes dummy workers and remembers them in the order in which they were made."""

    def __init__(self, **options: object) -> None:
        self.options = options
        self.made: list[DummyWorker] = []

    def __call__(self, worker_id: int) -> DummyWorker:
        self.made.append(DummyWorker(worker_id, **self.options))  # type: ignore[arg-type]
        return self.made[-1]


def pool_of(num_workers: int, fleet: Callable[[int], DummyWorker] | None = None, **options: object) -> RolloutPool:
    return RolloutPool(num_workers=num_workers, make_handle=fleet or Fleet(), **options)  # type: ignore[arg-type]


def keys(samples: list[Sample]) -> Counter:
    return Counter((sample.prompt_index, sample.sample_index) for sample in samples)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def weights(folder: Path, name: str, value: float = 1.0, **extra: np.ndarray) -> Path:
    return write_safetensors(folder / name, {"a": np.full((2, 3), value, np.float32), **extra})


# -- samples -----------------------------------------------------------------------------------------------------------
def test_every_sample_comes_once_and_the_report_adds_up() -> None:
    with pool_of(3) as pool:
        stream = pool.generate(["one", "two", [1, 2, 3]] * 10, n=4, sampling_params=PARAMS)
        samples = list(stream)
    assert keys(samples) == {(prompt, i): 1 for prompt in range(30) for i in range(4)}
    report = stream.report
    assert report.samples == 120
    assert report.generated_tokens == 120 * 8
    assert sum(worker.samples for worker in report.workers) == 120
    assert report.restarts == report.regenerated_samples == 0
    assert all(
        0 <= worker.utilisation <= 1 and 0 <= worker.occupancy <= worker.utilisation for worker in report.workers
    )


async def test_samples_stream_as_they_finish_also_in_asyncio() -> None:
    lengths = {0: 200, 1: 1}
    fleet = Fleet(length=lambda key: lengths[key[1]], seconds_per_token=0.002, capacity=1)
    async with pool_of(2, fleet) as pool:
        order = [sample.prompt_index async for sample in pool.generate(["slow", "fast"], 1, {"max_tokens": 500})]
    assert order == [1, 0]


def test_two_runs_at_once_get_their_own_samples() -> None:
    with pool_of(2, Fleet(seconds_per_token=0.0005)) as pool:
        first, second = pool.generate(["a"] * 5, 3, PARAMS), pool.generate(["b"] * 7, 2, PARAMS)
        assert keys(list(second)) == {(prompt, i): 1 for prompt in range(7) for i in range(2)}
        assert keys(list(first)) == {(prompt, i): 1 for prompt in range(5) for i in range(3)}


def test_generate_all_is_ordered() -> None:
    with pool_of(2, Fleet(length=lambda key: 9 - key[2], seconds_per_token=0.001)) as pool:
        samples = pool.generate_all(["a", "b"], 3, PARAMS)
    assert [(sample.prompt_index, sample.sample_index) for sample in samples] == [
        (p, i) for p in range(2) for i in range(3)
    ]


def test_the_tail_is_shared_when_one_worker_holds_all_of_it() -> None:
    with pool_of(2, Fleet(capacity=2, seconds_per_token=0.001)) as pool:
        stream = pool.generate(["only"], 24, PARAMS)
        list(stream)
    assert stream.report.moved_samples > 0
    assert min(worker.samples for worker in stream.report.workers) >= 6


def test_what_a_straggler_holds_but_has_not_begun_is_taken_back() -> None:
    """Worker 0 sticks to its first sample for ever; its lookahead must not wait behind it."""

    def length(key: tuple[int, int, int]) -> int:
        return 10_000 if key[1] == 0 else 1

    with pool_of(2, Fleet(capacity=1, length=length, seconds_per_token=0.001), lookahead=3) as pool:
        stream = pool.generate(["stuck"] + ["quick"] * 6, 1, {"max_tokens": 10_000})
        quick = [next(stream) for _ in range(6)]
        assert {sample.prompt_index for sample in quick} == set(range(1, 7))
        assert {sample.worker_id for sample in quick} == {1}
        stream.cancel()
        assert list(stream) == []
    assert stream.report.samples == 6


def test_cancel_ends_the_run_and_frees_the_workers() -> None:
    fleet = Fleet(capacity=4, seconds_per_token=0.05)
    with pool_of(1, fleet) as pool:
        stream = pool.generate(["a"] * 50, 1, PARAMS)
        stream.cancel()
        assert len(list(stream)) < 50
        fleet.made[0]._seconds_per_token = 0.0
        assert len(pool.generate_all(["b"], 2, PARAMS)) == 2


@pytest.mark.parametrize(
    "prompts, n, params, message",
    [
        ([], 1, None, "prompts: the list is empty"),
        ("text", 1, None, "prompts: pass a list"),
        (["a"], 0, None, "n: 0 samples per prompt"),
        (["a"], 1, {"n": 2}, "sampling_params: n belongs to generate"),
        (["a"], 1, 7, "sampling_params: int is neither"),
    ],
)
def test_requests_that_make_no_sense_are_refused_at_once(prompts, n, params, message) -> None:
    with pool_of(1) as pool, pytest.raises(InvalidRequestError, match=message):
        pool.generate(prompts, n, params)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("x" * 64, "prompt 1 has 64 tokens but the model takes 64 .max_model_len."),
        ([], "prompt 1 is empty"),
        ([1, "two"], "prompt 1 is neither a text nor a list of token ids"),
        ({"prompt": "x", "multi_modal_data": {}}, "prompt 1 has multi_modal_data, which the pool does not pass on"),
    ],
)
def test_prompts_that_do_not_fit_are_named_before_anything_is_generated(prompt, message) -> None:
    fleet = Fleet(max_model_len=64)
    with pool_of(1, fleet) as pool:
        with pytest.raises(InvalidRequestError, match=message):
            list(pool.generate(["fits", prompt], 1, PARAMS))
        assert fleet.made[0]._counters["generated_tokens"] == 0
        assert len(pool.generate_all(["x" * 63], 1, PARAMS)) == 1


def test_a_pool_that_is_not_running_says_so() -> None:
    pool = pool_of(1)
    with pytest.raises(RolloutError, match="the pool is not running"):
        pool.generate(["a"])
    with pool:
        pass
    with pytest.raises(RolloutError, match="the pool is not running"):
        pool.generate(["a"])


# -- faults ------------------------------------------------------------------------------------------------------------
def test_killed_workers_are_replaced_and_no_sample_is_lost_or_doubled() -> None:
    begun, made = Counter(), []

    class Mortal(DummyWorker):
        def _begin(self, task) -> None:
            super()._begin(task)
            begun.update(["samples"])
            if begun["samples"] in (50, 150, 250):
                self._die(RuntimeError("boom"))

    def fleet(worker_id: int) -> DummyWorker:
        made.append(Mortal(worker_id, capacity=4, seconds_per_token=0.0005))
        return made[-1]

    with pool_of(2, fleet) as pool:
        stream = pool.generate(["p"] * 100, 4, PARAMS)
        samples = list(stream)
    assert keys(samples) == {(prompt, i): 1 for prompt in range(100) for i in range(4)}
    assert len(made) == 5
    assert stream.report.restarts == 3
    assert max(sample.attempt for sample in samples) > 1
    assert stream.report.regenerated_samples >= sum(sample.attempt > 1 for sample in samples)


class BornDead(DummyWorker):
    """Starts, and dies with the first sample."""

    def _begin(self, task) -> None:
        self._die(RuntimeError("bad luck"))


def test_a_worker_that_never_gets_anywhere_is_given_up_and_the_others_finish() -> None:
    made: list[int] = []
    killed: list[int] = []

    class Unlucky(BornDead):
        async def kill(self) -> None:
            killed.append(self.worker_id)
            await super().kill()

    def fleet(worker_id: int) -> DummyWorker:
        made.append(worker_id)
        return Unlucky(worker_id) if worker_id == 0 else DummyWorker(worker_id, seconds_per_token=0.001)

    with pool_of(2, fleet, max_restarts=2) as pool:
        assert len(pool.generate_all(["p"] * 40, 4, PARAMS)) == 160
        assert made.count(0) == 3
        assert killed == [0, 0, 0]  # the last one, too: an engine keeps its memory as long as its process


def test_a_fault_of_the_pool_itself_ends_a_run_instead_of_leaving_it_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_of(1) as pool:
        monkeypatch.setattr(pool, "_deliver", lambda slot, reply: 1 // 0)
        with pytest.raises(PoolFailedError, match="stopped collecting: ZeroDivisionError"):
            pool.generate_all(["p"], 1, PARAMS)


def test_after_a_fault_of_the_pool_itself_the_other_workers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_of(2) as pool:
        deliver, faults = pool._deliver, iter([True])

        def faulty(slot, reply) -> None:
            if reply.finished and next(faults, False):
                raise ZeroDivisionError
            deliver(slot, reply)

        monkeypatch.setattr(pool, "_deliver", faulty)
        with pytest.raises(PoolFailedError, match="stopped collecting"):
            pool.generate_all(["p"], 1, PARAMS)
        assert len(pool.generate_all(["p"] * 20, 2, PARAMS)) == 40
        pool._wait(pool._drain("wait"))


def test_finished_samples_can_be_read_before_the_error_that_ends_a_run() -> None:
    class DiesLater(DummyWorker):
        def _begin(self, task) -> None:
            if task.key[1] >= 3:
                self._die(RuntimeError("bad luck"))
            else:
                super()._begin(task)

    with pool_of(1, lambda worker_id: DiesLater(worker_id, capacity=1), max_restarts=1) as pool:
        stream = pool.generate(["p"] * 5, 1, PARAMS)
        assert [next(stream).prompt_index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(PoolFailedError, match=r"no worker is left; .*bad luck"):
            next(stream)
        with pytest.raises(PoolFailedError, match="no worker is left"):
            list(pool.generate(["p"], 1, PARAMS))


def test_a_pool_whose_workers_do_not_start_says_why() -> None:
    class Refuses(DummyWorker):
        async def start(self) -> WorkerInfo:
            raise InvalidRequestError("worker 0: the engine did not start: no such model")

    with pytest.raises(PoolFailedError, match="no such model"), pool_of(1, Refuses):
        pass


# -- weights -----------------------------------------------------------------------------------------------------------
def test_samples_are_tagged_with_the_version_that_made_them(tmp_path: Path) -> None:
    fleet = Fleet(seconds_per_token=0.001)
    with pool_of(2, fleet) as pool:
        before = pool.generate_all(["p"], 4, PARAMS)
        pool.set_weights(weights(tmp_path, "one.safetensors"), 1)
        after = pool.generate_all(["p"], 4, PARAMS)
        assert pool.weight_version == 1
    assert {sample.weight_version for sample in before} == {0}
    assert {sample.weight_version for sample in after} == {1}
    assert all(worker.loaded == [(str(tmp_path / "one.safetensors"), 1)] for worker in fleet.made)


@pytest.mark.parametrize("running", ["wait", "restart"])
def test_an_update_in_the_middle_of_a_run(tmp_path: Path, running: str) -> None:
    """Dummy tokens tell which version made them: the tag must agree with them, and no sample is lost."""

    class Held(DummyWorker):
        """The second half of the prompts waits for the update."""

        def _emit(self, task) -> None:
            if task.key[1] < 4 or pool.weight_version == 1 or (running == "wait" and pool._paused):
                super()._emit(task)
            else:
                self._timers[task.key] = asyncio.get_running_loop().call_later(0.001, self._emit, task)

    with pool_of(2, lambda worker_id: Held(worker_id, seconds_per_token=0.002, capacity=4)) as pool:
        stream = pool.generate(["p"] * 8, 8, PARAMS)
        samples = [next(stream) for _ in range(10)]
        pool.set_weights(weights(tmp_path, "one.safetensors"), 1, running)
        samples += list(stream)
    assert keys(samples) == {(prompt, i): 1 for prompt in range(8) for i in range(8)}
    for sample in samples:
        made_with = (sample.token_ids[0] - sample.prompt_index * 7919 - sample.sample_index * 104729) % 32000
        assert made_with == sample.weight_version
    assert {sample.weight_version for sample in samples} == {0, 1}
    assert (max(sample.attempt for sample in samples) == 2) == (running == "restart")


def test_an_update_waits_for_a_worker_that_is_being_brought_to_the_weights_before(tmp_path: Path) -> None:
    """Else the worker comes back with the old ones when all others have the new."""
    made: list[DummyWorker] = []
    loading, gate = threading.Event(), asyncio.Event()

    class Slow(DummyWorker):
        async def _load(self, path: str, version: int) -> None:
            if self is made[-1] and len(made) == 3 and version == 1:
                loading.set()
                await gate.wait()
            await super()._load(path, version)

    def fleet(worker_id: int) -> DummyWorker:
        made.append(Slow(worker_id))
        return made[-1]

    with pool_of(2, fleet) as pool:
        pool.set_weights(weights(tmp_path, "one.safetensors"), 1)
        pool._from_outside(made[1]._die, RuntimeError("boom"))
        assert loading.wait(30)
        update = threading.Thread(target=pool.set_weights, args=(weights(tmp_path, "two.safetensors"), 2))
        update.start()
        update.join(0.2)
        assert update.is_alive() and made[0].loaded[-1][1] == 1
        pool._from_outside(gate.set)
        update.join(30)
        assert pool.weight_version == 2
    assert [[version for _, version in worker.loaded] for worker in (made[0], made[2])] == [[1, 2], [1, 2]]


async def test_a_sample_under_which_the_weights_changed_is_never_delivered(tmp_path: Path) -> None:
    class BegunBefore(DummyWorker):
        def _emit(self, task) -> None:
            self._end(task, [1], None, None, "length", 0)

    worker = BegunBefore(0, seconds_per_token=0.001)
    await worker.start()
    await worker.submit(
        [GenerateRequest(run=0, prompt_index=0, prompt_token_ids=[1], samples=[(0, 1)], sampling_params=PARAMS)]
    )
    await worker.load_weights(str(weights(tmp_path, "one.safetensors")), 1)
    with pytest.raises(WorkerDeadError, match="changed its weights under a running sample"):
        await worker.collect(30.0)


@pytest.mark.parametrize("running", ["wait", "restart"])
def test_an_update_waits_for_no_sample_that_has_not_begun(tmp_path: Path, running: str) -> None:
    """What a worker holds in advance is made with the new weights, for the first time; an update once waited for it."""
    with pool_of(1, Fleet(seconds_per_token=0.02, capacity=1), lookahead=3) as pool:
        stream = pool.generate(["p"] * 6, 1, PARAMS)
        first = next(stream)
        pool.set_weights(weights(tmp_path, "one.safetensors"), 1, running)
        rest = list(stream)
    assert first.weight_version == 0
    # One sample was being made when the update came.
    assert Counter(sample.weight_version for sample in rest) == ({0: 1, 1: 4} if running == "wait" else {1: 5})
    assert Counter(sample.attempt for sample in rest) == ({1: 5} if running == "wait" else {2: 1, 1: 4})
    assert stream.report.moved_samples == 0


def test_a_worker_that_fails_to_load_takes_the_whole_update_back(tmp_path: Path) -> None:
    made: list[DummyWorker] = []

    def fleet(worker_id: int) -> DummyWorker:
        made.append(DummyWorker(worker_id, refuse_versions=[2] if worker_id == 1 else []))
        return made[-1]

    with pool_of(3, fleet) as pool:
        pool.set_weights(weights(tmp_path, "one.safetensors"), 1)
        with pytest.raises(WeightUpdateError, match=r"worker 1 failed to load it .*; all workers hold version 1 again"):
            pool.set_weights(weights(tmp_path, "two.safetensors"), 2)
        assert pool.weight_version == 1
        assert {sample.weight_version for sample in pool.generate_all(["p"] * 6, 4, PARAMS)} == {1}
        pool.set_weights(weights(tmp_path, "three.safetensors"), 3)
        assert {sample.weight_version for sample in pool.generate_all(["p"] * 6, 4, PARAMS)} == {3}
    assert [version for _, version in made[0].loaded] == [1, 2, 1, 3]
    assert len(made) == 3


def test_a_worker_that_cannot_go_back_is_built_again_on_the_known_version(tmp_path: Path) -> None:
    made: list[DummyWorker] = []

    def fleet(worker_id: int) -> DummyWorker:
        made.append(DummyWorker(worker_id, refuse_versions=[1] if worker_id == 1 else []))
        return made[-1]

    with pool_of(2, fleet) as pool:
        with pytest.raises(WeightUpdateError, match="all workers hold version 0 again"):
            pool.set_weights(weights(tmp_path, "one.safetensors"), 1)  # version 0 of a dummy has no folder
        assert {sample.weight_version for sample in pool.generate_all(["p"] * 40, 4, PARAMS)} == {0}
    assert len(made) == 4


def test_a_restarted_worker_holds_the_present_version(tmp_path: Path) -> None:
    fleet = Fleet(seconds_per_token=0.0005)
    with pool_of(1, fleet) as pool:
        path = weights(tmp_path, "one.safetensors")
        pool.set_weights(path, 1)
        pool._from_outside(fleet.made[0]._die, RuntimeError("boom"))
        assert {sample.weight_version for sample in pool.generate_all(["p"] * 8, 4, PARAMS)} == {1}
        assert fleet.made[1].loaded == [(str(path), 1)]


def test_a_restarted_worker_holds_version_0_that_was_set_again(tmp_path: Path) -> None:
    """It starts with the weights of the engine, which are version 0 only until that is another's name."""
    fleet = Fleet(seconds_per_token=0.0005)
    with pool_of(1, fleet) as pool:
        pool.set_weights(weights(tmp_path, "one.safetensors"), 1)
        path = weights(tmp_path, "zero.safetensors")
        pool.set_weights(path, 0)
        pool._from_outside(fleet.made[0]._die, RuntimeError("boom"))
        assert {sample.weight_version for sample in pool.generate_all(["p"] * 8, 4, PARAMS)} == {0}
        assert fleet.made[1].loaded == [(str(path), 0)]


def test_a_worker_lost_while_it_reads_the_prompts_does_not_end_the_run() -> None:
    class Lost(DummyWorker):
        async def encode(self, prompts: list[str]) -> list[list[int]]:
            self._die(RuntimeError("boom"))
            raise WorkerDeadError("worker 0 is lost")

    made: list[DummyWorker] = []

    def make(worker_id: int) -> DummyWorker:
        made.append((DummyWorker if made else Lost)(worker_id))
        return made[-1]

    with pool_of(1, make) as pool:
        assert len(pool.generate_all(["p"] * 8, 4, PARAMS)) == 32
    assert len(made) == 2


def test_copies_of_the_weights_beside_them_are_left_alone(tmp_path: Path) -> None:
    """As vLLM leaves them: Mistral's own format, and what an index does not name."""
    shards = [weights(tmp_path, f"model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    write_safetensors(tmp_path / "consolidated.safetensors", {"b": np.zeros(3, np.float32)})
    assert weight_files(tmp_path) == shards
    other = weights(tmp_path, "old.safetensors")
    assert weight_files(tmp_path) == [*shards, other]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0].name, "b": shards[1].name}}))
    assert weight_files(tmp_path) == shards
    index.write_text("{")
    with pytest.raises(WeightUpdateError, match="cannot be read"):
        weight_files(tmp_path)


def test_a_version_whose_files_were_changed_is_never_loaded_as_that_version(tmp_path: Path) -> None:
    fleet = Fleet()
    with pool_of(1, fleet, max_restarts=1) as pool:
        path = weights(tmp_path, "one.safetensors")
        pool.set_weights(path, 1)
        weights(tmp_path, "one.safetensors", 2.0, b=np.zeros(5, np.float32))
        pool._from_outside(fleet.made[0]._die, RuntimeError("boom"))
        with pytest.raises(PoolFailedError, match=r"version 1 in .* were changed after they were loaded"):
            pool.generate_all(["p"] * 8, 4, PARAMS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused_before_any_worker_is_touched(tmp_path: Path, bad: float) -> None:
    tensor = np.ones((4, 4), np.float32)
    tensor[2, 1] = bad
    fleet = Fleet()
    with pool_of(2, fleet) as pool:
        with pytest.raises(WeightUpdateError, match="tensor b holds a non-finite value at flat index 9"):
            pool.set_weights(weights(tmp_path, "bad.safetensors", b=tensor), 1)
        assert pool.weight_version == 0
        assert len(pool.generate_all(["p"], 2, PARAMS)) == 2
    assert all(worker.loaded == [] for worker in fleet.made)


BITS: dict[str, tuple[type[np.unsignedinteger], list[int], list[int]]] = {
    "F64": (
        np.uint64,
        [0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1],
        [(0x7FF << 52) - 1, 0x3FF << 52, 1],
    ),
    "F32": (np.uint32, [0x7F80_0000, 0xFF80_0000, 0x7FC0_0000, 0x7F80_0001], [0x7F7F_FFFF, 0x3F80_0000, 1]),
    "BF16": (np.uint16, [0x7F80, 0xFF80, 0x7FC0, 0x7F81], [0x7F7F, 0xFF7F, 0x3F80, 1]),
    "F16": (np.uint16, [0x7C00, 0xFC00, 0x7E00, 0x7C01], [0x7BFF, 0xFBFF, 0x3C00, 1]),
    "F8_E5M2": (np.uint8, [0x7C, 0xFC, 0x7D, 0xFF], [0x7B, 0xFB, 0x3C, 1]),
    "F8_E4M3": (np.uint8, [0x7F, 0xFF], [0x7E, 0xFE, 0x78, 0x38, 1]),  # which has no infinities
}
"""By dtype: infinities and NaNs, and finite numbers: the largest, one, and the smallest."""


@pytest.mark.parametrize("dtype", BITS)
def test_what_is_finite_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    unit, bad, good = BITS[dtype]
    for number, value in enumerate([*bad, *good]):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(safetensors_of("a", dtype, np.array([*good, value], unit)))
        if value in good:
            check_finite(read_index(path))
        else:
            with pytest.raises(WeightUpdateError, match=f"tensor a holds a non-finite value at flat index {len(good)}"):
                check_finite(read_index(path))


def safetensors_of(name: str, dtype: str, tensor: np.ndarray) -> bytes:
    entry = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}
    encoded = json.dumps({name: entry}).encode()
    return struct.pack("<Q", len(encoded)) + encoded + tensor.tobytes()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    one = np.ones((2, 2), np.float32)
    with pool_of(1) as pool:
        pool.set_weights(weights(tmp_path, "one.safetensors", b=one), 1)
        with pytest.raises(WeightUpdateError, match="tensor b is missing"):
            pool.set_weights(weights(tmp_path, "two.safetensors"), 2)
        with pytest.raises(WeightUpdateError, match="the model has no tensor c"):
            pool.set_weights(weights(tmp_path, "three.safetensors", b=one, c=one), 2)
        with pytest.raises(WeightUpdateError, match=r"tensor b has shape \[4\] but the model's has \[2, 2\]"):
            pool.set_weights(weights(tmp_path, "four.safetensors", b=np.ones(4, np.float32)), 2)
        with pytest.raises(WeightUpdateError, match="neither a safetensors file nor a folder"):
            pool.set_weights(tmp_path / "nowhere", 2)
        with pytest.raises(WeightUpdateError, match="version: 1 is negative or the present one"):
            pool.set_weights(tmp_path / "one.safetensors", 1)
        pool.set_weights(weights(tmp_path, "five.safetensors", b=one, **{"lm_head.weight": one}), 2)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, struct.pack("<Q", 1 << 40), struct.pack("<Q", 3) + b"{{{"])
def test_files_that_are_not_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pool_of(1) as pool, pytest.raises(WeightUpdateError, match="cannot be read as safetensors"):
        pool.set_weights(path, 1)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = weights(tmp_path, "short.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pool_of(1) as pool, pytest.raises(WeightUpdateError, match="cut short inside tensor a"):
        pool.set_weights(path, 1)


# -- the output file ---------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 4,096 bytes.

    Not a fixture: pytest reports while fixtures are alive, and its output may be a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


async def test_a_full_disk_keeps_every_finished_sample(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    async with pool_of(1, Fleet(seconds_per_token=0.0001)) as pool:
        stream = pool.generate(["p"] * 50, 2, PARAMS)
        with pytest.raises(OutputFullError, match="samples are complete in the file") as caught, full_disk():
            await write_samples(path, stream)
        rest = [sample async for sample in stream]
    kept = list(read_samples(path))
    assert len(kept) == caught.value.written > 0
    assert keys(kept + caught.value.unwritten + rest) == {(prompt, i): 1 for prompt in range(50) for i in range(2)}


def test_a_result_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_whole(path, "[1]")
    with full_disk(), pytest.raises(EngineError, match=r"bench.json cannot be written .*: free space"):
        write_whole(path, "[" + "1, " * 5000 + "1]")
    assert path.read_text() == "[1]" and list(tmp_path.iterdir()) == [path]


def test_a_real_full_device_gives_one_clear_error(tmp_path: Path) -> None:
    sample = Sample(
        prompt_index=0, sample_index=0, token_ids=[1], finish_reason="stop", worker_id=0, weight_version=0, attempt=1
    )
    target = tmp_path / "full"
    target.symlink_to("/dev/full")
    with SampleWriter(target) as writer, pytest.raises(OutputFullError, match="No space left on device") as caught:
        writer.write(sample)
    assert caught.value.unwritten == [sample]


def test_writing_appends_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "samples.jsonl"

    async def run() -> None:
        async with pool_of(1) as pool:
            assert await write_samples(path, pool.generate(["p"], 3, PARAMS)) == 3
            assert await write_samples(path, pool.generate(["p"], 2, PARAMS)) == 2

    asyncio.run(run())
    assert len(list(read_samples(path))) == 5


def test_a_lone_worker_streams_a_group_and_refuses_after_its_death() -> None:
    async def run() -> None:
        worker = DummyWorker(0)
        request = GenerateRequest(
            run=0, prompt_index=0, prompt_token_ids=[1], samples=[(0, 1), (1, 1)], sampling_params=PARAMS
        )
        assert {sample.sample_index async for sample in worker.generate(request)} == {0, 1}
        await worker.kill()
        with pytest.raises(WorkerDeadError, match="worker 0 was killed"):
            await worker.submit([request])

    asyncio.run(run())


class FakeEngine:
    """Decodes `places` requests at once and queues the others, as vLLM does; one that is cancelled is aborted."""

    def __init__(self, places: int) -> None:
        self.model_config = SimpleNamespace(skip_tokenizer_init=True)
        self.errored = False
        self.begun: list[str] = []
        self.aborted: list[str] = []
        self._places = asyncio.Semaphore(places)

    async def generate(self, prompt: dict, params: object, request_id: str) -> AsyncIterator[object]:
        try:
            async with self._places:
                self.begun.append(request_id)
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            self.aborted.append(request_id)
            await asyncio.sleep(0.03)  # the abort travels to the engine
            raise
        completion = SimpleNamespace(token_ids=[1, 2], logprobs=None, text="", finish_reason="length")
        yield SimpleNamespace(outputs=[completion])


async def test_a_worker_gives_back_what_its_engine_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine holds as many samples as it decodes in its own queue; the last ones are given back first."""
    monkeypatch.setattr("vllm_selfspec.rollout.worker._sampling_params", lambda task: None)
    worker = RolloutWorker(0, {})
    engine = worker._engine = FakeEngine(places=2)
    worker._capacity, worker._handed_over, worker._logs_stats = 2, 4, False

    def request(samples: list[int]) -> GenerateRequest:
        return GenerateRequest(
            run=0, prompt_index=0, prompt_token_ids=[5], samples=[(i, 1) for i in samples], sampling_params={}
        )

    await worker.submit([request([0, 1, 2, 3, 4])])
    await asyncio.sleep(0.01)
    stats = await worker.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    assert [key[2] for key in await worker.reclaim(2)] == [4, 3]  # one of the worker's queue, one of the engine's
    assert [key[2] for key in await worker.reclaim(9)] == [2]
    assert await worker.reclaim(9) == []
    await worker.submit([request([3])])  # back at once, while the engine is told to drop it
    samples = []
    while len(samples) < 3:
        samples += [finished.sample for finished in (await worker.collect(5.0)).finished]
    assert sorted(sample.sample_index for sample in samples) == [0, 1, 3]
    assert engine.begun == ["0-0-0-1", "0-0-1-1", "0-0-3-1"]
    assert sorted(engine.aborted) == ["0-0-2-1", "0-0-3-1"]
    stats = await worker.stats()
    assert (stats.generated_tokens, stats.prompt_tokens, stats.running, stats.waiting) == (6, 3, 0, 0)
    assert not worker._tasks


def test_the_driver_imports_neither_vllm_nor_torch_nor_ray() -> None:
    script = "import sys, vllm_selfspec.rollout; print([m for m in ('vllm', 'torch', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
