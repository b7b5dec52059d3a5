"""The plugin in real processes: it reaches the engine core's process, honours its environment variable, refuses what it
cannot do in one sentence, and leaves vLLM alone when nobody asks for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from engines import engine, free_port, generate, greedy, random_prompt, server
from vllm.engine.arg_utils import EngineArgs

from vllm_selfspec import plugin
from vllm_selfspec.config import ConfigError, SelfSpecConfig
from vllm_selfspec.control.cost_model import CostModel, Point
from vllm_selfspec.drafter.cpu_kernels import own_kernels
from vllm_selfspec.drafter.proposer import SelfDraftProposer
from vllm_selfspec.drafter.quantize import CpuInt4Linear
from vllm_selfspec.speculative_config import SelfSpecSpeculativeConfig, check_engine

PROMPT = random_prompt(20, 0)
SETTINGS: dict[str, Any] = {
    "method": "selfspec",
    "num_speculative_tokens": 3,
    "drafter": {"weights": "int8", "lm_head": "native"},
    "control": {"mode": "fixed"},
}

ENGINE = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    asked = json.loads(sys.argv[1])
    llm = LLM(dtype="float32", enforce_eager=True, skip_tokenizer_init=True, generation_config="vllm", block_size=32,
              max_model_len=256, num_gpu_blocks_override=64, disable_log_stats=False, **asked["arguments"])
    prompt = {"prompt_token_ids": asked["prompt"]}
    sampling = [SamplingParams(temperature=t, max_tokens=40) for t in asked.get("temperatures", [0.0])]
    output = llm.generate([prompt] * len(sampling), sampling, use_tqdm=False)[0]
    told = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    counters = {"accepted": "vllm:spec_decode_num_accepted_tokens", "drafted": "vllm:spec_decode_num_draft_tokens"}
    told = {name: told.get(counter, 0) for name, counter in counters.items()}
    told["tokens"] = output.outputs[0].token_ids
    if asked.get("identity"):
        from dataclasses import asdict
        from vllm_selfspec.live_profile import profile_identity
        config = llm.llm_engine.vllm_config
        told["identity"] = asdict(profile_identity(config, config.speculative_config.selfspec))
    if asked.get("seams"):
        from vllm.v1.worker.gpu_worker import Worker
        from vllm_selfspec import plugin
        def wrapped(seams):
            here = [s for s in seams if s.concerns_this_version()]
            return [s.target for s in here if hasattr(getattr(*plugin._owner(s.target)), "_selfspec_seam")]
        told["wrapped"] = wrapped(plugin.IN_WORKERS + plugin.IN_CPU_WORKERS)
        told["methods"] = [name for name in plugin.WORKER_METHODS if hasattr(Worker, name)]
        told["mended"] = wrapped(plugin.MENDS)
    print(">" + json.dumps(told))

if __name__ == "__main__":
    main()
"""


def run_engine(folder: Path, asked: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Run an engine in a process of its own and return what it told."""
    script = folder / "engine.py"
    script.write_text(ENGINE)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps({"prompt": PROMPT, **asked})],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(">")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1][1:])  # type: ignore[no-any-return]  # a JSON object


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., str]) -> list[int]:
    with engine(tiny("llama")) as llm:
        return list(generate(llm, [PROMPT], greedy(40))[0][0])


def test_flag_reaches_the_engine_core_process(tmp_path: Path, tiny: Callable[..., str], plain: list[int]) -> None:
    arguments = {"model": tiny("llama"), "speculative_config": SETTINGS}
    told = run_engine(tmp_path, {"arguments": arguments}, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert told["tokens"] == plain
    assert told["accepted"] > 10


def test_environment_variable_reaches_the_engine_core_process(
    tmp_path: Path, tiny: Callable[..., str], plain: list[int]
) -> None:
    told = run_engine(
        tmp_path,
        {"arguments": {"model": tiny("llama")}},
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_SELFSPEC=json.dumps(SETTINGS),
    )
    assert told["tokens"] == plain
    assert told["accepted"] > 10


def test_a_spawned_adaptive_engine_core_times_itself(
    tmp_path: Path, tiny: Callable[..., str], plain: list[int]
) -> None:
    """It once was built before its process knew the plugin, and decided without a profile."""
    speculative = {"method": "selfspec", "num_speculative_tokens": 2}
    arguments = {"model": tiny("llama"), "speculative_config": speculative, "max_num_seqs": 2}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
    told = run_engine(tmp_path, {"arguments": arguments}, XDG_CACHE_HOME=str(tmp_path / "cache"), **environment)
    assert told["tokens"] == plain
    (profile,) = (tmp_path / "cache" / "vllm-selfspec" / "profiles").iterdir()
    assert {point.batch for point in CostModel.from_profile(profile).points} == {1, 2}


def test_ranks_of_tensor_parallelism_draft_the_same(tmp_path: Path, tiny: Callable[..., str], plain: list[int]) -> None:
    """Each rank samples the drafts by itself; were one to draw another token, hardly a draft would be accepted."""
    arguments = {"model": tiny("llama"), "speculative_config": SETTINGS, "tensor_parallel_size": 2}
    arguments |= {"distributed_executor_backend": "mp"}
    told = run_engine(tmp_path, {"arguments": arguments, "temperatures": [0.0, 1.0, 1.0]})
    assert told["accepted"] > 0.8 * told["drafted"] > 40
    assert told["tokens"] == plain


def test_ranks_that_schedule_for_themselves_adapt_alike(
    tmp_path: Path, tiny: Callable[..., str], plain: list[int]
) -> None:
    """TRL's colocate mode with tensor parallelism: were ranks to choose different draft lengths, all would hang."""
    arguments = {"model": tiny("llama"), "tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}

    def ranks(control: dict[str, Any]) -> list[dict[str, Any]]:
        port = str(free_port())

        def rank(number: int) -> dict[str, Any]:
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            launcher = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
            launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            speculative = {"method": "selfspec", "num_speculative_tokens": 3, "control": control}
            asked = {"arguments": arguments | {"speculative_config": speculative}, "temperatures": [0.0, 1.0, 1.0]}
            return run_engine(folder, asked | {"identity": True}, **launcher)

        with ThreadPoolExecutor() as launcher:
            return list(launcher.map(rank, range(2)))

    always, _ = ranks({"mode": "fixed"})
    # The times of an engine whose drafts are cheap: how long steps really take differs from rank to rank.
    points = [Point("target", batch, 64, 0, 0.010) for batch in (1, 2)]
    points += [Point("verify", batch, 64, length, 0.011) for batch in (1, 2) for length in (1, 3)]
    points += [Point("draft", batch, 64, 1, 0.001) for batch in (1, 2)]
    CostModel.fit(points, meta=always["identity"]).save(tmp_path / "profile.json")

    first, second = ranks({"profile": str(tmp_path / "profile.json"), "probe_interval": 8})
    assert first["drafted"] == second["drafted"] > 40
    assert first["accepted"] == second["accepted"] > 0.8 * first["drafted"]
    assert first["tokens"] == second["tokens"] == always["tokens"] == plain


def test_ranks_of_data_parallelism_decide_each_for_itself(
    tmp_path: Path, tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM runs the ranks of a dense model as engines of their own, so each may have its own draft lengths."""
    # vLLM 0.33 on CPU takes the number of a rank for that of a memory node, unless this is set, to whatever.
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "0")
    flags = ["--data-parallel-size", "2", "--max-num-seqs", "2", "--speculative-config"]
    settings = json.dumps({"method": "selfspec", "num_speculative_tokens": 2})
    with server(tiny("llama"), tmp_path / "server.log", *flags, settings) as url:

        def ask() -> None:
            request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 32, "detokenize": False}
            httpx.post(f"{url}/v1/completions", json=request, timeout=120).raise_for_status()

        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(ask) for _ in range(8)]:
                done.result()
        told = httpx.get(f"{url}/metrics").text
    steps = dict.fromkeys("01", 0.0)
    for rank, count in re.findall(r'vllm:selfspec_steps_total\{engine="(\d)".*\} (\S+)', told):
        steps[rank] += float(count)
    assert all(count > 10 for count in steps.values()), steps


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.mark.parametrize("speculative", [None, NGRAM], ids=["none", "ngram"])
def test_other_engines_are_left_alone(
    speculative: dict[str, Any] | None, tmp_path: Path, tiny: Callable[..., str], plain: list[int]
) -> None:
    """No seam of the worker is wrapped, nothing mended, in an engine that runs in this very process."""
    arguments = {"model": tiny("llama"), "speculative_config": speculative}
    told = run_engine(tmp_path, {"arguments": arguments, "seams": True})
    assert told["tokens"] == plain
    assert told["wrapped"] == told["methods"] == told["mended"] == []


def test_a_selfspec_engine_wraps_the_seams(tmp_path: Path, tiny: Callable[..., str]) -> None:
    """The test above can fail: the same questions to an engine with the flag."""
    arguments = {"model": tiny("llama"), "speculative_config": SETTINGS}
    told = run_engine(tmp_path, {"arguments": arguments, "seams": True})
    seams = [seam for seam in (*plugin.IN_WORKERS, *plugin.IN_CPU_WORKERS) if seam.concerns_this_version()]
    # One of them depends on the CPU.
    assert told["wrapped"] == [s.target for s in seams if s.needed is None or plugin._function(s.needed)()]
    assert told["methods"] == list(plugin.WORKER_METHODS)
    assert told["mended"]


def test_register_twice_wraps_once() -> None:
    plugin.register()
    seams = [seam for seam in plugin.EVERYWHERE if seam.concerns_this_version()]
    before = [getattr(*plugin._owner(seam.target)) for seam in seams]
    plugin.register()
    assert [getattr(*plugin._owner(seam.target)) for seam in seams] == before
    for wrapped in before:
        assert not hasattr(wrapped.__wrapped__, "_selfspec_seam")


def config_of(model: str, **arguments: Any) -> Any:
    """The engine config that vLLM makes of these arguments."""
    defaults = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128, "speculative_config": SETTINGS}
    return EngineArgs(model=model, **(defaults | arguments)).create_engine_config()


def test_environment_variable_of_one_means_all_defaults(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SELFSPEC", "1")
    config = config_of(tiny("llama"), speculative_config=None)
    assert isinstance(config.speculative_config, SelfSpecSpeculativeConfig)
    assert config.speculative_config.selfspec.num_speculative_tokens == 7
    monkeypatch.setenv("VLLM_SELFSPEC", "0")
    assert config_of(tiny("llama"), speculative_config=None).speculative_config is None


def test_the_environment_leaves_engines_alone_that_write_no_text(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a reward model beside the policy, which is built in the same process."""
    monkeypatch.setenv("VLLM_SELFSPEC", "1")
    config = config_of(tiny("llama"), speculative_config=None, runner="pooling")
    assert config.speculative_config is None and config.scheduler_config.scheduler_cls is None


def test_a_speculative_config_wins_over_the_environment(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SELFSPEC", "1")
    config = config_of(tiny("llama"), speculative_config=NGRAM)
    assert config.speculative_config.method == "ngram"
    assert config_of(tiny("llama")).speculative_config.selfspec.num_speculative_tokens == 3


def test_dashes_in_keys_are_underscores(tiny: Callable[..., str]) -> None:
    asked = {"method": "selfspec", "num-speculative-tokens": 2, "control": {"mode": "fixed"}}
    assert config_of(tiny("llama"), speculative_config=asked).speculative_config.num_speculative_tokens == 2


REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("drafter.exit_layer", {"drafter": {"exit_layer": 4}}, {}),
    ("drafter.skip_layers", {"drafter": {"skip_layers": [0, 1, 2, 3]}}, {}),
    ("drafter.skip_layers", {"drafter": {"skip_layers": [4]}}, {}),
    ("drafter.wieghts", {"drafter": {"wieghts": "int8"}}, {}),
    ("pipeline_parallel_size", {}, {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}),
    ("scheduler_cls", {}, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}),
    ("runner", {}, {"runner": "pooling"}),
    ("enable_prompt_embeds", {}, {"enable_prompt_embeds": True}),
]


def assert_one_sentence(message: str, field: str) -> None:
    """`message` names the field, and is one sentence that ends there."""
    assert field in message
    assert message.endswith(".") and "\n" not in message and len(message) < 300
    assert ". " not in message


@pytest.mark.parametrize(("field", "settings", "arguments"), REFUSALS, ids=[refusal[0] for refusal in REFUSALS])
def test_refusals_at_configuration(
    field: str, settings: dict[str, Any], arguments: dict[str, Any], tiny: Callable[..., str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tiny("llama"), speculative_config=SETTINGS | settings, **arguments)
    assert_one_sentence(str(caught.value), field)


@pytest.mark.parametrize("mode", ["adaptive", "off"])
def test_ranks_of_a_mixture_that_may_differ_are_refused(mode: str, tiny: Callable[..., str]) -> None:
    """They run every layer together."""
    with pytest.raises(ConfigError) as caught:
        config_of(tiny("qwen3_moe"), speculative_config=SETTINGS | {"control": {"mode": mode}}, data_parallel_size=2)
    assert_one_sentence(str(caught.value), "data_parallel_size")


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        ("is_encoder_decoder", "encoder-decoder"),
        ("is_hybrid", "hybrid"),
        ("is_attention_free", "state-space"),
    ],
)
def test_models_of_other_kinds_are_refused(flag: str, kind: str) -> None:
    flags = dict.fromkeys(("is_moe", "is_encoder_decoder", "is_hybrid", "is_attention_free"), False)
    parallel = SimpleNamespace(pipeline_parallel_size=1, distributed_executor_backend="mp")

    def check(**flags: bool) -> None:
        layers = {"get_total_num_hidden_layers": lambda: 4}
        model = SimpleNamespace(runner_type="generate", enable_prompt_embeds=False, **flags, **layers)
        check_engine(SelfSpecConfig(), model, parallel)

    check(**flags)
    with pytest.raises(ConfigError) as caught:
        check(**flags | {flag: True})
    assert_one_sentence(str(caught.value), kind)


def test_two_kinds_of_attention_are_refused(tiny: Callable[..., str]) -> None:
    """On V1; for V2 see test_cuda_fakes.py."""
    settings = {"drafter": {"weights": "native", "lm_head": "native"}, "control": {"mode": "fixed"}}
    with pytest.raises(ConfigError) as caught, engine(tiny("gemma2"), settings, disable_hybrid_kv_cache_manager=False):
        pass
    assert_one_sentence(str(caught.value), "KV-cache group")


def test_runner_v1_refuses_ranks_that_draft_together(tiny: Callable[..., str]) -> None:
    config = config_of(tiny("qwen3_moe"), speculative_config=SETTINGS, data_parallel_size=2)
    with pytest.raises(ConfigError) as caught:
        SelfDraftProposer(config, torch.device("cpu"))
    assert_one_sentence(str(caught.value), "data_parallel_size")


@pytest.mark.parametrize("field", ["drafter.weights", "drafter.lm_head"])
def test_precision_without_a_kernel_is_refused(field: str, tiny: Callable[..., str]) -> None:
    drafter = {"weights": "native", "lm_head": "native", field.split(".")[1]: "fp8"}
    with (
        pytest.raises(ConfigError) as caught,
        engine(tiny("llama"), {"drafter": drafter, "control": {"mode": "fixed"}}),
    ):
        pass
    assert_one_sentence(str(caught.value), field)


def test_int4_of_odd_shapes_is_refused(tiny: Callable[..., str]) -> None:
    """ATen's kernel wants whole groups; the package's own fill them up with zeros."""
    with pytest.raises(ConfigError) as caught:
        CpuInt4Linear(torch.zeros(64, 160))
    assert_one_sentence(str(caught.value), "int4")
    drafter = {"weights": "int4", "lm_head": "native"}
    refused = contextlib.nullcontext() if own_kernels() else pytest.raises(ConfigError, match="int4")
    with refused, engine(tiny("llama", intermediate_size=160), {"drafter": drafter, "control": {"mode": "fixed"}}):
        pass
