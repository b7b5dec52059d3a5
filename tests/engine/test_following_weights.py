"""The quantized drafter follows every way in which the target's weights change (greedy, float32, tiny models).

Drafts of stale weights are nearly always rejected on these random models, and greedy float32 decoding is deterministic,
so "as good as a fresh engine" is an equality: the same drafts accepted, the same text.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import addresses, drafter_of, runner_of, scheduler_of
from safetensors.torch import load_file
from tiny_models import write_checkpoint
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from vllm_selfspec.control.alarm import AcceptanceAlarm
from vllm_selfspec.drafter import refresh
from vllm_selfspec.drafter.experts import is_experts
from vllm_selfspec.drafter.refresh import IDLE_SECONDS, WeightTap
from vllm_selfspec.metrics import PREFIX
from vllm_selfspec.plugin import older_than

PROMPTS = [[7, 11, 13, 17, 19], [23, 29, 31]]
SPEC = {"method": "selfspec", "num_speculative_tokens": 3, "drafter": {"weights": "int8", "lm_head": "int8"}}
FIXED = SPEC | {"control": {"mode": "fixed"}}


def engine(path: Path) -> LLM:
    return LLM(
        str(path),
        speculative_config=dict(FIXED),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        block_size=32,
        num_gpu_blocks_override=64,
        disable_log_stats=False,
        seed=0,
    )


def accepted_and_text(llm: LLM) -> tuple[int, list[list[int]]]:
    """Drafts accepted while generating, and the tokens generated."""

    def accepted() -> int:
        return sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")  # type: ignore[union-attr]

    before = accepted()
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return accepted() - before, [list(o.outputs[0].token_ids) for o in outputs]


def buffers(llm: LLM) -> dict[Any, list[int]]:
    return {s: addresses(s) for s in drafter_of(llm)._tap._states.values()}


@pytest.fixture(scope="module", params=["llama", "llama_tied"])
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return tuple(write_checkpoint(folder / str(seed), request.param, seed=seed) for seed in (1, 2))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def fresh(checkpoints: tuple[Path, Path], in_process: None) -> tuple[int, list[list[int]]]:
    """What an engine started on the second checkpoint does."""
    llm = engine(checkpoints[1])
    result = accepted_and_text(llm)
    assert result[0] > 40, "the int8 drafter must be good for these tests to mean anything"
    return result


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(autouse=True)
def hooks_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint must not find what a hook should have told."""
    if write_in_place.__name__ not in request.node.name:
        monkeypatch.setattr(refresh, "IDLE_SECONDS", 3600.0)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's unpacked mode on CPU: weights stay on the layers, where trainers that own the process write to them."""
    from vllm import _custom_ops as ops

    monkeypatch.setattr(ops, "_supports_onednn", False)


@pytest.mark.parametrize("stays", [False, True], ids=["packed", "unpacked"])
def test_reload_weights(
    stays: bool,
    checkpoints: tuple[Path, Path],
    fresh: tuple[int, list[list[int]]],
    request: pytest.FixtureRequest,
) -> None:
    if stays:
        request.getfixturevalue("unpacked")
    llm = engine(checkpoints[0])
    assert accepted_and_text(llm)[1] != fresh[1]
    places = buffers(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoints[1])})
    assert accepted_and_text(llm) == fresh
    assert buffers(llm) == places
    (report,) = llm.collective_rpc("selfspec_refresh")
    # Once each; where the weights stay on the layers they used to be quantized twice.
    assert report["total_layers"] - report["layers"] == len(places)
    assert report["total_seconds"] > 0 and report["bytes"] > 0
    told = {metric.name: metric for metric in llm.get_metrics()}
    assert told["vllm:selfspec_refreshed_layers"].value == report["total_layers"] - report["layers"]
    seconds = told["vllm:selfspec_refresh_seconds"]
    assert seconds.count == 1 and 0 < seconds.sum <= report["total_seconds"]


def test_experts_follow_a_reload(tmp_path: Path) -> None:
    """The target's, which vLLM's kernel for CPUs reads in an order of its own, and the drafter's."""
    before, after = (write_checkpoint(tmp_path / str(seed), "qwen3_moe", seed=seed) for seed in (1, 2))

    def layers_of(llm: LLM) -> list[Any]:
        return [module for module in runner_of(llm).model.modules() if is_experts(module)]

    def weights_of(llm: LLM) -> list[torch.Tensor]:
        return [weight.clone() for layer in layers_of(llm) for weight in (layer.w13_weight, layer.w2_weight)]

    def drafts_of(llm: LLM) -> list[torch.Tensor]:
        states = drafter_of(llm)._tap._states
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
        ids, weights = torch.tensor([[0, 1], [2, 3], [3, 1]]), torch.full((3, 2), 0.5)
        return [states[layer].apply(x, weights, ids, None) for layer in layers_of(llm) if layer in states]

    llm = engine(after)
    fresh, fresh_drafts, answer = weights_of(llm), drafts_of(llm), accepted_and_text(llm)
    # Before, vLLM chooses experts on CPU inside of their kernel.
    assert len(fresh_drafts) == (0 if current_platform.is_cpu() and older_than("0.32") else 4)
    del llm  # else it takes the groups of processes along when it goes
    gc.collect()
    llm = engine(before)
    assert not any(map(torch.equal, weights_of(llm), fresh)) and not any(map(torch.equal, drafts_of(llm), fresh_drafts))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(after)})
    assert accepted_and_text(llm) == answer
    assert all(map(torch.equal, weights_of(llm), fresh)) and all(map(torch.equal, drafts_of(llm), fresh_drafts))


@pytest.mark.skipif(not current_platform.is_cpu(), reason="layers outside an engine, on CPU alone")
@pytest.mark.parametrize("layers", [2, 16, 32, 48, 80])
@pytest.mark.parametrize("kind", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
def test_a_write_into_one_kind_of_layer_is_noticed(kind: str, layers: int) -> None:
    """As where an adapter is merged; a layer has the six tensors of Llama's."""
    model = torch.nn.Module()
    model.embed_tokens = torch.nn.Embedding(64, 64)
    model.layers = torch.nn.ModuleList()
    tap = WeightTap(None, lambda _: "int8")
    written = []
    for _ in range(layers):
        layer = torch.nn.Module()
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            linear = torch.nn.Linear(64, 64, bias=False)
            setattr(layer, name, linear)
            tap.capture(linear, linear.weight)
            written += [linear] if name == kind else []
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, torch.nn.LayerNorm(64, bias=False))
        model.layers.append(layer)
    model.load_weights = lambda _: None
    tap.watch(model)
    assert tap.refresh() == 0
    for linear in written:
        linear.weight.data.add_(1)
    tap._last_proposal = float("-inf")  # after a pause
    assert tap.refresh() == 4 * layers


def load_whole(llm: LLM, state: dict[str, torch.Tensor]) -> None:
    llm.apply_model(lambda model: model.load_weights(iter(state.items())) and None)


def load_by_parameter(llm: LLM, state: dict[str, torch.Tensor]) -> None:
    """As colocated trainers do it: one parameter per call, no processing afterwards."""
    for item in state.items():
        llm.apply_model(lambda model, item=item: model.load_weights(iter([item])) and None)


def write_in_place(llm: LLM, state: dict[str, torch.Tensor]) -> None:
    """Behind the engine's back, past every hook: the fingerprint notices after a pause."""
    model = runner_of(llm).model
    type(model).load_weights(model, iter(state.items()))
    time.sleep(2 * IDLE_SECONDS)


@pytest.mark.parametrize("update", [load_whole, load_by_parameter, write_in_place])
def test_updates_that_vllm_does_not_finish(
    update: Any,
    checkpoints: tuple[Path, Path],
    fresh: tuple[int, list[list[int]]],
    unpacked: None,
    request: pytest.FixtureRequest,
) -> None:
    if "[llama_tied" not in request.node.name:
        pytest.skip("tied weights are the harder case; one model is enough for the unpacked mode")
    llm = engine(checkpoints[0])
    accepted_and_text(llm)
    places = buffers(llm)
    update(llm, load_file(checkpoints[1] / "model.safetensors"))
    accepted, text = accepted_and_text(llm)
    assert text == fresh[1]
    assert accepted == fresh[0]
    assert buffers(llm) == places
    del llm
    gc.collect()


def test_the_user_hears_of_a_stale_drafter_once_and_the_controller_of_a_new_one(
    checkpoints: tuple[Path, Path],
    fresh: tuple[int, list[list[int]]],
    unpacked: None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "[llama_tied" not in request.node.name:
        pytest.skip("one model is enough")
    llm = engine(checkpoints[0])
    scheduler, model, changes = scheduler_of(llm), runner_of(llm).model, []
    scheduler._alarm = AcceptanceAlarm(fast=20.0)  # few drafts are enough
    monkeypatch.setattr(scheduler._controller, "drafter_has_changed", lambda: changes.append(None))

    def alarms() -> int:
        return sum(metric.value for metric in llm.get_metrics() if metric.name == PREFIX + "acceptance_alarms")

    accepted_and_text(llm)
    assert alarms() == 0
    type(model).load_weights(model, iter(load_file(checkpoints[1] / "model.safetensors").items()))
    accepted, text = accepted_and_text(llm)
    assert text == fresh[1] and accepted < fresh[0] / 2
    assert alarms() == 1 and not changes
    llm.collective_rpc("selfspec_refresh")
    assert accepted_and_text(llm) == fresh
    assert alarms() == 1 and len(changes) == 1
