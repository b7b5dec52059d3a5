"""The pool on Ray with real engines: what it returns, how it follows the weights, and what real kills do to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from vllm_selfspec.rollout import (  # noqa: E402
    DummyWorker,
    GenerateRequest,
    InvalidRequestError,
    RolloutPool,
    RolloutWorker,
    Sample,
    WeightUpdateError,
    WorkerStats,
)

ENGINE = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 128,
    "block_size": 32,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 26,
}
PROMPTS = [list(range(start, start + 10 + start % 7)) for start in range(0, 200, 25)]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "seed": 11, "logprobs": 0}


@contextlib.contextmanager
def bare_engine(model: str) -> Iterator[LLM]:
    llm = LLM(model=model, **ENGINE)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def bare(llm: LLM, params: dict[str, Any], n: int = 1) -> dict[tuple[int, int], Any]:
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, SamplingParams(n=n, **params), use_tqdm=False)
    return {(p, completion.index): completion for p, output in enumerate(outputs) for completion in output.outputs}


def tokens(results: Any) -> dict[tuple[int, int], list[int]]:
    if isinstance(results, dict):
        return {key: list(completion.token_ids) for key, completion in results.items()}
    return {(sample.prompt_index, sample.sample_index): sample.token_ids for sample in results}


@pytest.fixture(scope="module")
def checkpoints(tiny: Callable[..., str]) -> tuple[str, str]:
    """Two versions of one model with tied embeddings."""
    return tiny("llama_tied"), tiny("llama_tied", seed=1)


@pytest.fixture(scope="module")
def expected(checkpoints: tuple[str, str]) -> dict[str, Any]:
    """What vLLM makes without a pool: greedy on both versions, and four seeded samples per prompt on the old one."""
    with bare_engine(checkpoints[0]) as llm:
        found = {"old": tokens(bare(llm, GREEDY)), "sampled": bare(llm, SAMPLED, n=4)}
    with bare_engine(checkpoints[1]) as llm:
        found["new"] = tokens(bare(llm, GREEDY))
    assert found["old"] != found["new"]
    return found


@pytest.fixture(scope="module")
def pool(checkpoints: tuple[str, str], expected: dict[str, Any]) -> Iterator[RolloutPool]:
    with RolloutPool(checkpoints[0], num_workers=2, engine_args=ENGINE) as running:
        yield running


def greedy_on_every_worker(pool: RolloutPool) -> list[Sample]:
    """Enough samples that both workers make some of them."""
    samples = pool.generate_all(PROMPTS, 4, GREEDY)
    assert {sample.worker_id for sample in samples} == {0, 1}
    return samples


def check_version(pool: RolloutPool, version: int, expected: dict[tuple[int, int], list[int]]) -> None:
    for sample in greedy_on_every_worker(pool):
        assert sample.weight_version == version
        assert sample.token_ids == expected[sample.prompt_index, 0], f"worker {sample.worker_id}"


def test_workers_do_not_draw_the_same_noise(pool: RolloutPool) -> None:
    """First of all tests: only fresh engines, which once had one seed, would make the same samples of one prompt."""
    samples = pool.generate_all([PROMPTS[0]] * 2, 4, {**SAMPLED, "seed": None})
    by_worker = [{tuple(s.token_ids) for s in samples if s.worker_id == worker} for worker in (0, 1)]
    assert all(by_worker) and not by_worker[0] & by_worker[1]


def test_samples_are_those_of_a_bare_engine(pool: RolloutPool, expected: dict[str, Any]) -> None:
    """Tokens, log probabilities, finish reasons; a seed gives the same samples whichever worker makes them."""
    stream = pool.generate(PROMPTS, 4, SAMPLED)
    samples = list(stream)
    want = expected["sampled"]
    assert tokens(samples) == tokens(want)
    for sample in samples:
        completion = want[sample.prompt_index, sample.sample_index]
        logprobs = [
            entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        assert sample.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert sample.finish_reason == completion.finish_reason
    assert len({sample.worker_id for sample in samples}) == 2
    assert stream.report.generated_tokens == len(samples) * 12
    assert sum(worker.generated_tokens for worker in pool._wait(pool.stats())) >= len(samples) * 12


def test_vllms_own_sampling_params_are_understood(pool: RolloutPool, expected: dict[str, Any]) -> None:
    samples = pool.generate_all(PROMPTS, 4, SamplingParams(**SAMPLED))
    assert tokens(samples) == tokens(expected["sampled"])


def test_requests_that_the_engine_refuses_end_with_its_reason(pool: RolloutPool) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 1 has 128 tokens but the model takes 128"):
        pool.generate_all([[1], [1] * 128], 1, GREEDY)
    with pytest.raises(InvalidRequestError, match=r"(?i)temperature"):
        pool.generate_all([[1]], 1, {"temperature": -1.0})
    with pytest.raises(InvalidRequestError, match=r"sampling_params"):
        pool.generate_all([[1]], 1, {"no_such_field": 1})
    with pytest.raises(InvalidRequestError, match="the engine has no tokenizer"):
        pool.generate_all(["text"], 1, GREEDY)
    assert len(pool.generate_all([[1]], 2, GREEDY)) == 2


def test_an_update_in_the_middle_of_a_run_reaches_every_worker(
    pool: RolloutPool, checkpoints: tuple[str, str], expected: dict[str, Any]
) -> None:
    """Each greedy sample must be what a bare engine makes with the version that the sample is tagged with."""
    for version, (path, running) in enumerate([(checkpoints[1], "wait"), (checkpoints[0], "restart")], start=1):
        stream = pool.generate(PROMPTS * 4, 4, GREEDY)
        samples = [next(stream) for _ in range(20)]
        pool.set_weights(path, version, running)  # type: ignore[arg-type]
        samples += list(stream)
        assert Counter((sample.prompt_index, sample.sample_index) for sample in samples) == {
            (prompt, i): 1 for prompt in range(32) for i in range(4)
        }
        assert {sample.weight_version for sample in samples} == {version - 1, version}
        for sample in samples:
            made_by = expected["new" if sample.weight_version == 1 else "old"]
            assert sample.token_ids == made_by[sample.prompt_index % len(PROMPTS), 0]
        assert running == "wait" or any(sample.attempt == 2 for sample in samples)


def test_a_state_dict_can_be_sent(pool: RolloutPool, checkpoints: tuple[str, str], expected: dict[str, Any]) -> None:
    pool.set_weights(load_file(Path(checkpoints[1]) / "model.safetensors"), 3)
    check_version(pool, 3, expected["new"])
    bad = load_file(Path(checkpoints[0]) / "model.safetensors")
    bad["model.norm.weight"][3] = torch.inf
    with pytest.raises(WeightUpdateError, match=r"tensor model.norm.weight holds a non-finite value at flat index 3"):
        pool.set_weights(bad, 4)
    check_version(pool, 3, expected["new"])


def test_an_engine_killed_during_an_update_takes_the_update_back_everywhere(
    pool: RolloutPool, checkpoints: tuple[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    """Worker 1's engine is stopped, so that worker 0 holds the new weights already when worker 1 fails."""
    before = pool.weight_version
    (engine,) = next(worker for worker in pool.workers if worker.worker_id == 1).engine_pids
    save_file(load_file(Path(checkpoints[0]) / "model.safetensors"), tmp_path / "back.safetensors")
    os.kill(engine, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        update = threads.submit(pool.set_weights, tmp_path / "back.safetensors", before + 1)
        deadline = time.monotonic() + 60
        while pool._wait(pool._slots[0].handle.stats()).weight_version != before + 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(WeightUpdateError, match=f"all workers hold version {before} again"):
            update.result()
    assert pool.weight_version == before
    while len(pool.workers) < 2:
        time.sleep(0.2)
    check_version(pool, before, expected["new"])


def test_a_thousand_samples_survive_three_real_kills(pool: RolloutPool, expected: dict[str, Any]) -> None:
    """An engine process, an actor by Ray, an actor's process: nothing is lost and nothing comes twice."""

    def kill_engine() -> None:
        os.kill(pool.workers[0].engine_pids[0], signal.SIGKILL)

    def kill_actor() -> None:
        ray.kill(pool._slots[pool.workers[-1].worker_id].handle.actor)

    def kill_process() -> None:
        while not pool.workers:
            time.sleep(0.1)
        os.kill(pool.workers[0].pid, signal.SIGKILL)

    kills = {200: kill_engine, 450: kill_actor, 700: kill_process}
    engines = {pid for worker in pool.workers for pid in worker.engine_pids}
    stream = pool.generate((PROMPTS * 32)[:250], 4, {**GREEDY, "max_tokens": 4})
    samples = []
    for sample in stream:
        samples.append(sample)
        if len(samples) in kills:
            kills[len(samples)]()
    assert Counter((sample.prompt_index, sample.sample_index) for sample in samples) == {
        (prompt, i): 1 for prompt in range(250) for i in range(4)
    }
    for sample in samples:  # also those that were begun again, by restarted workers
        assert sample.token_ids == expected["new"][sample.prompt_index % len(PROMPTS), 0][:4]
    assert {sample.weight_version for sample in samples} == {pool.weight_version}
    assert stream.report.restarts >= 2  # the last one may still be on its way
    assert any(sample.attempt > 1 for sample in samples)
    # No process of a killed worker is left behind.
    while len(pool.workers) < 2:
        time.sleep(0.2)
    alive = {pid for worker in pool.workers for pid in worker.engine_pids}
    for pid in engines - alive:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_gives_back_what_its_engine_has_not_begun(
    checkpoints: tuple[str, str], expected: dict[str, Any]
) -> None:
    """The engine holds its successors itself, so that it can begin them in the step in which a place is freed."""
    params = {**GREEDY, "max_tokens": 100}

    async def run() -> tuple[list[tuple[int, int, int]], list[Sample], WorkerStats]:
        worker = RolloutWorker(0, {"model": checkpoints[0], **ENGINE})
        try:
            await worker.start()
            request = {"run": 0, "prompt_index": 0, "prompt_token_ids": PROMPTS[0], "sampling_params": params}
            await worker.submit([GenerateRequest(samples=[(i, 1) for i in range(20)], **request)])
            await asyncio.sleep(0.05)
            stats = await worker.stats()
            back = await worker.reclaim(10)
            again = await worker.reclaim(10)
            await worker.submit([GenerateRequest(samples=[(key[2], 1) for key in back], **request)])
            samples: list[Sample] = []
            while len(samples) < 20 - len(again):
                samples += [finished.sample for finished in (await worker.collect(60.0)).finished]
            return back + again, samples, stats
        finally:
            await worker.close()

    reclaimed, samples, stats = asyncio.run(run())
    assert (stats.running, stats.waiting) == (8, 12)
    assert sorted(key[2] for key in reclaimed) == list(range(8, 20))  # the first eight are being made
    assert [key[2] for key in reclaimed[:10]] == list(range(19, 9, -1))
    assert sorted(sample.sample_index for sample in samples) == [*range(8), *range(10, 20)]
    assert len({tuple(sample.token_ids) for sample in samples}) == 1


def test_what_a_worker_started_ends_with_it() -> None:
    """A process that does not watch its parent, as vLLM's engine does while it is busy."""
    code = (
        "import os, subprocess; from vllm_selfspec.rollout.worker import RolloutWorker;"
        "worker = RolloutWorker(0, {}, own_processes=True);"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True); os.kill(os.getpid(), 9)"
    )
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    pid = int(output.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/status").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "a process outlived the worker that started it"
        time.sleep(0.05)


def test_a_shutdown_ends_an_update_that_is_under_way() -> None:
    """As Ctrl-C in a trainer leaves it: whoever waits for the update must not wait for ever."""
    loading = threading.Event()

    class Stuck(DummyWorker):
        async def _load(self, path: str, version: int) -> None:
            loading.set()
            await asyncio.sleep(3600)

    ended: list[BaseException] = []

    def update() -> None:
        try:
            pool.set_weights({"weight": torch.zeros(2)}, 1)
        except BaseException as error:
            ended.append(error)

    with RolloutPool(make_handle=Stuck) as pool:
        waiting = threading.Thread(target=update, daemon=True)
        waiting.start()
        assert loading.wait(60)
    waiting.join(30)
    assert [type(error) for error in ended] == [concurrent.futures.CancelledError]
