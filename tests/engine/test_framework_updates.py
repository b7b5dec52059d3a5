"""The order in which RL frameworks update their engine's weights, replayed on real engines (greedy, float32, tiny).

Each sequence is that of a framework's published source (versions and places in docs/integrations.md), call for call
but without its transport: tensors are handed over in the process. Afterwards the target must be that of a fresh engine
on the new weights, and the drafter too: the same products of every quantized weight, the same drafts accepted.
Frameworks run these calls on CUDA. On CPU vLLM packs weights and drops the originals, so whoever writes to parameters
directly needs its unpacked mode; the layerwise reloads work in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import addresses, drafter_in, drafter_of, engine, generate, greedy, random_prompt, runner_of, watch
from safetensors.torch import load_file
from torch import nn
from vllm import LLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    layerwise,
    meta,
)
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from vllm_selfspec.config import ConfigError
from vllm_selfspec.drafter import refresh
from vllm_selfspec.drafter.quantize import QuantizedLinear
from vllm_selfspec.drafter.refresh import WeightTap
from vllm_selfspec.scheduler import control_settings

SELFSPEC: dict[str, Any] = {
    "num_speculative_tokens": 3,
    "drafter": {"weights": "int8", "lm_head": "int8"},
    "control": {"mode": "fixed"},
}
PROMPTS = [random_prompt(12, seed) for seed in (1, 2)]
Weights = list[tuple[str, torch.Tensor]]


class TrainerExtension:
    """A `worker_extension_cls` that makes the frameworks' calls; vLLM mixes it into its worker."""

    def trainer_load(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """A bucket (verl, NeMo-RL) or a single parameter (OpenRLHF, TRL's server)."""
        self.model_runner.model.load_weights(weights=weights)

    def trainer_process(self: Any) -> None:
        """verl, after the last bucket."""
        process_weights_after_loading(self.model_runner.model, self.vllm_config.model_config, self.device)

    def trainer_process_in_context(self: Any) -> None:
        """NeMo-RL, after the last batch."""
        with set_current_vllm_config(self.vllm_config):
            process_weights_after_loading(self.model_runner.model, self.model_config, self.device)

    def trainer_start(self: Any) -> None:
        """SkyRL: start of the layerwise lifecycle."""
        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            initialize_layerwise_reload(self.model_runner.model)

    def trainer_chunk(self: Any, weights: Weights) -> None:
        """SkyRL: one chunk; it then loads the same tensors into any drafter that has a `load_weights`."""
        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            self.model_runner.model.load_weights(weights=weights)
            drafter = drafter_in(self.model_runner).model
            assert not hasattr(drafter, "load_weights"), "the target's tensors would be loaded into the drafter"

    def trainer_finish(self: Any) -> None:
        """SkyRL: end of the layerwise lifecycle."""
        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            finalize_layerwise_reload(self.model_runner.model, self.model_config)

    def trainer_reload(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """prime-rl, file system and NCCL: the whole lifecycle around one load."""
        model = self.model_runner.model
        with torch.device(self.device), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            model.load_weights(weights)
            finalize_layerwise_reload(model, self.model_config)

    @torch.no_grad()
    def trainer_copy(self: Any, weights: dict[str, torch.Tensor]) -> None:
        """Kernel format (prime-rl quantizing in the transfer, SkyRL not in checkpoint format): nothing but copies."""
        for name, tensor in weights.items():
            self.model_runner.model.get_parameter(name).copy_(tensor)

    @torch.no_grad()
    def trainer_replay(self: Any, weights: dict[str, torch.Tensor]) -> None:
        """prime-rl, NIXL: every layer materialized, filled, processed and restored, past `load_weights`."""
        model = self.model_runner.get_model()
        with torch.device(self.device), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            for prefix, layer in model.named_modules():
                own = {name: weights.get(f"{prefix}.{name}") for name in dict(layer.named_parameters(recurse=False))}
                if not own or None in own.values():
                    continue
                info = layerwise.LAYERWISE_INFO[layer]
                meta.materialize_layer(layer, info)
                for name, tensor in own.items():
                    getattr(layer, name).copy_(tensor)
                method = getattr(layer, "quant_method", None)
                if isinstance(method, QuantizeMethodBase):
                    method.process_weights_after_loading(layer)
                layerwise._copy_and_restore_kernel_tensors(layer, info)
                info.reset()
            finalize_layerwise_reload(model, self.model_runner.model_config)


def weights_of(path: Path) -> Weights:
    """The checkpoint's tensors, in an order that splits layers between buckets."""
    return sorted(load_file(path / "model.safetensors").items(), key=lambda item: item[0][::-1])


def buckets(path: Path) -> list[Weights]:
    weights = weights_of(path)
    return [weights[start::3] for start in range(3)]


def kernel_format(path: Path) -> dict[str, torch.Tensor]:
    """The same under vLLM's parameter names, projections fused."""
    state = dict(weights_of(path))
    fused: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for whole, parts in {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }.items():
            if parts[0] in name:
                fused[name.replace(parts[0], whole)] = torch.cat([state[name.replace(parts[0], p)] for p in parts])
                break
            if any(part in name for part in parts):
                break
        else:
            fused[name] = tensor
    return fused


def rpc(llm: LLM, method: str, *args: Any) -> None:
    llm.collective_rpc(method, args=args)


@contextmanager
def asleep(llm: LLM, level: int) -> Iterator[None]:
    """Weights are updated between waking them and waking the cache; CPU workers only note that they cannot sleep."""
    llm.sleep(level=level)
    llm.wake_up(tags=["weights"])
    try:
        yield
    finally:
        llm.wake_up(tags=["kv_cache"])


def verl(llm: LLM, path: Path) -> None:
    with asleep(llm, 2):
        for bucket in buckets(path):
            rpc(llm, "trainer_load", bucket)
        rpc(llm, "trainer_process")
        llm.reset_prefix_cache()


def nemo_rl(llm: LLM, path: Path) -> None:
    with asleep(llm, 1):
        for bucket in buckets(path):
            rpc(llm, "trainer_load", bucket)
        rpc(llm, "trainer_process_in_context")


def openrlhf(llm: LLM, path: Path) -> None:
    """Also TRL's server, less the sleep."""
    llm.reset_prefix_cache()
    with asleep(llm, 1):
        for item in weights_of(path):
            rpc(llm, "trainer_load", [item])


def trl_colocate(llm: LLM, path: Path) -> None:
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    for item in weights_of(path):
        model.load_weights([item])
    llm.reset_prefix_cache()


def skyrl(llm: LLM, path: Path) -> None:
    rpc(llm, "trainer_start")
    for bucket in buckets(path):
        rpc(llm, "trainer_chunk", bucket)
    rpc(llm, "trainer_finish")
    llm.reset_prefix_cache()


def prime_rl(llm: LLM, path: Path) -> None:
    rpc(llm, "trainer_reload", iter(weights_of(path)))


def prime_rl_nixl(llm: LLM, path: Path) -> None:
    rpc(llm, "trainer_replay", kernel_format(path))


def kernel_copies(llm: LLM, path: Path) -> None:
    rpc(llm, "trainer_copy", kernel_format(path))


def kernel_copies_then_refresh(llm: LLM, path: Path) -> None:
    kernel_copies(llm, path)
    (report,) = llm.collective_rpc("selfspec_refresh")
    assert report["layers"] == len(tap_of(llm)._states)


@dataclass
class State:
    """What an engine says: tokens, drafts accepted on the way, and products of the drafter's quantized weights."""

    tokens: list[list[tuple[int, ...]]]
    accepted: int
    products: list[torch.Tensor]


def tap_of(llm: LLM) -> WeightTap:
    return drafter_of(llm)._tap


@torch.inference_mode()
def state_of(llm: LLM) -> State:
    llm.reset_prefix_cache()
    seen = watch(llm)
    tokens = generate(llm, PROMPTS, greedy(48, ignore_eos=True))
    states = tap_of(llm)._states
    products = []
    for module in runner_of(llm).model.modules():
        if module in states:
            columns = module.input_size if hasattr(module, "input_size") else module.embedding_dim
            x = torch.linspace(-1, 1, 2 * columns).reshape(2, columns)
            products.append(states[module].apply(x, None))
    assert len(products) == len(states)
    return State(tokens, seen.accepted, products)


def same(one: State, other: State) -> bool:
    return (
        one.tokens == other.tokens
        and one.accepted == other.accepted
        and all(torch.equal(a, b) for a, b in zip(one.products, other.products, strict=True))
    )


def start(path: Path, **arguments: Any) -> Any:
    return engine(str(path), SELFSPEC, worker_extension_cls=f"{__name__}.TrainerExtension", max_num_seqs=4, **arguments)


@pytest.fixture(autouse=True)
def hooks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint, which looks after a pause, must not find what a hook should have told."""
    monkeypatch.setattr(refresh, "IDLE_SECONDS", 3600.0)


@pytest.fixture(scope="module", params=["llama_tied", "llama"])
def versions(request: pytest.FixtureRequest, tiny: Callable[..., str]) -> tuple[Path, Path]:
    return Path(tiny(request.param, seed=1)), Path(tiny(request.param, seed=2))


@pytest.fixture(scope="module")
def fresh(versions: tuple[Path, Path]) -> State:
    """A fresh engine on the new weights, its text checked against plain decoding."""
    with engine(str(versions[1]), max_num_seqs=4) as plain:
        tokens = generate(plain, PROMPTS, greedy(48, ignore_eos=True))
    with start(versions[1]) as llm:
        state = state_of(llm)
    assert state.tokens == tokens
    assert state.accepted > 40, "the drafter must be good for these tests to mean anything"
    return state


@pytest.fixture(scope="module")
def packed(versions: tuple[Path, Path], fresh: State) -> Iterator[tuple[LLM, State]]:
    """An engine on the old weights, and what it says of them."""
    with start(versions[0]) as llm:
        yield llm, state_of(llm)


@contextmanager
def unpacked_mode() -> Iterator[None]:
    """vLLM's unpacked mode on CPU: weights stay on the layers, where they are written to."""
    from vllm import _custom_ops as ops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_supports_onednn", False)
        yield


@pytest.fixture(scope="module")
def unpacked(versions: tuple[Path, Path]) -> Iterator[tuple[LLM, State]]:
    """The same in the unpacked mode."""
    with unpacked_mode(), start(versions[0]) as llm:
        yield llm, state_of(llm)


def there_and_back(update: Callable[[LLM, Path], None], llm: LLM, versions: tuple[Path, Path], *want: State) -> None:
    """Update to the new weights, then to the old: each time everything is as in a fresh engine, in the same buffers."""
    addresses = buffers(llm)
    for version in (1, 0):
        update(llm, versions[version])
        now = state_of(llm)
        assert now.tokens == want[version].tokens
        assert now.accepted == want[version].accepted
        assert same(now, want[version])
    assert buffers(llm) == addresses


def buffers(llm: LLM) -> list[int]:
    return sorted(address for state in tap_of(llm)._states.values() for address in addresses(state))


@pytest.mark.parametrize("update", [skyrl, prime_rl, prime_rl_nixl])
def test_layerwise_updates(update: Any, versions: tuple[Path, Path], packed: tuple[LLM, State], fresh: State) -> None:
    llm, old = packed
    there_and_back(update, llm, versions, old, fresh)


@pytest.mark.parametrize(
    "update", [verl, nemo_rl, openrlhf, trl_colocate, skyrl, prime_rl, prime_rl_nixl, kernel_copies_then_refresh]
)
def test_updates_of_weights_on_the_layers(
    update: Any, versions: tuple[Path, Path], unpacked: tuple[LLM, State], fresh: State
) -> None:
    llm, old = unpacked
    there_and_back(update, llm, versions, old, fresh)


def test_a_stale_drafter_is_told_from_a_fresh_one(
    versions: tuple[Path, Path], unpacked: tuple[LLM, State], fresh: State
) -> None:
    """What the sequences above would show if the drafter did not follow: the right text, hardly a draft accepted."""
    llm, old = unpacked
    trl_colocate(llm, versions[0])
    assert same(state_of(llm), old)
    kernel_copies(llm, versions[1])
    stale = state_of(llm)
    assert stale.tokens == fresh.tokens
    assert stale.accepted < fresh.accepted / 4
    llm.collective_rpc("selfspec_refresh")
    assert same(state_of(llm), fresh)


def test_sleep_mode_of_trl_reads_the_checkpoint_again(versions: tuple[Path, Path], unpacked: tuple[LLM, State]) -> None:
    """TRL pushes parameters, and before it generates it wakes the weights and calls `reload_weights`."""
    llm, old = unpacked
    with asleep(llm, 2):
        trl_colocate(llm, versions[1])
        llm.collective_rpc("reload_weights")
    assert same(state_of(llm), old)


def test_weights_that_come_while_requests_run(
    versions: tuple[Path, Path], unpacked: tuple[LLM, State], fresh: State
) -> None:
    """OpenRLHF (asynchronous) and prime-rl keep the running requests through an update."""
    llm, _old = unpacked
    trl_colocate(llm, versions[0])
    for number, prompt in enumerate(PROMPTS):
        llm.llm_engine.add_request(f"running-{number}", {"prompt_token_ids": prompt}, greedy(200, ignore_eos=True))
    outputs = [output for _ in range(4) for output in llm.llm_engine.step()]
    for item in weights_of(versions[1]):
        rpc(llm, "trainer_load", [item])
        outputs += llm.llm_engine.step()
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    assert [len(output.outputs[0].token_ids) for output in outputs if output.finished] == [200, 200]
    assert same(state_of(llm), fresh)


@pytest.mark.parametrize("update", [verl, kernel_copies])
def test_first_weights_after_dummy_ones(update: Any, versions: tuple[Path, Path], fresh: State) -> None:
    """The first drafter of a dummy-loaded engine is made of garbage, and used to stay so when the first real weights
    came as plain copies before the first proposal."""
    # What an engine before has reloaded by layers would be filled with dummy weights, in vLLM 0.24.
    getattr(rotary_embedding, "_ROPE_DICT", {}).clear()
    with unpacked_mode(), start(versions[0], load_format="dummy") as llm:
        update(llm, versions[1])
        assert same(state_of(llm), fresh)


class Recorded(QuantizedLinear):
    """A quantized weight that remembers what it was made of."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.made_of = weight.clone()

    def refresh(self, weight: torch.Tensor) -> None:
        self.made_of.copy_(weight)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return 0


class Target(nn.Module):
    """A model that can load weights, and has none that could be watched."""

    def load_weights(self, weights: Weights) -> None:
        raise NotImplementedError


def test_layers_processed_off_the_cpu_are_refreshed_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the weight stays on the layer. A layer processed anew, past `load_weights`, used to go unnoticed there
    (prime-rl over NIXL, a global `process_weights_after_loading` after plain copies), a head tied to it as well."""
    monkeypatch.setattr(refresh, "quantize", lambda weight, precision, light: Recorded(weight))
    embedding, head, linear = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False)
    head.weight = embedding.weight
    tap = WeightTap(object(), lambda layer: "native" if layer is embedding else "int8")
    for layer in (head, linear):
        tap.state(layer)
    tap.watch(Target())
    assert tap.refresh() == 0
    for layer in (embedding, linear):
        weight = nn.Parameter(torch.randn_like(layer.weight))
        layer.weight = nn.Parameter(weight.to("meta"))  # stands for any device but the CPU
        refresh.process_weights_after_loading(lambda *_: None, None, layer)
        layer.weight = weight
    head.weight = embedding.weight
    assert tap.refresh() == 2
    for layer in (head, linear):
        assert torch.equal(tap.state(layer).made_of, layer.weight)


def test_weights_that_come_just_before_the_first_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain copies into an engine that had started less than `IDLE_SECONDS` ago used to go unnoticed."""
    monkeypatch.setattr(refresh, "quantize", lambda weight, precision, light: Recorded(weight))
    model = Target()
    model.linear = nn.Linear(64, 8, bias=False)
    tap = WeightTap(object(), lambda layer: "int8")
    tap.state(model.linear)
    tap.watch(model)
    model.linear.weight.data.normal_()
    assert tap.refresh() == 1
    assert torch.equal(tap.state(model.linear).made_of, model.linear.weight)
    assert tap.refresh() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_an_update_is_when_the_weights_are_others(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proposal in the middle of one sees the old weights; one that fails may have written some."""
    monkeypatch.setattr(refresh, "quantize", lambda weight, precision, light: Recorded(weight))
    worker, model = SimpleNamespace(vllm_config=object()), Target()
    model.linear = nn.Linear(64, 8, bias=False)
    tap = WeightTap(worker.vllm_config, lambda layer: "int8")
    other = WeightTap(object(), lambda layer: "int8")
    for one in (tap, other):
        one.state(model.linear)
        one.watch(model)

    def update(self: Any, version: str) -> str:
        assert tap.refresh() == 0
        model.linear.weight.data.normal_()
        if fails:
            raise RuntimeError("half of the weights")
        return version

    with pytest.raises(RuntimeError, match="half of") if fails else nullcontext():
        assert refresh.update_ends(update, worker, version="7") == "7"
    assert tap.refresh() == 1
    assert torch.equal(tap.state(model.linear).made_of, model.linear.weight)
    assert not other._stale, "another engine's weights"


def test_one_scheduler_per_rank_wants_one_profile(tiny: Callable[..., str]) -> None:
    """TRL's colocate mode with tensor parallelism, where each rank would measure a profile of its own."""
    arguments = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}

    def configured(control: dict[str, Any], **launcher: Any) -> VllmConfig:
        speculative = {"method": "selfspec", "control": control}
        asked = EngineArgs(model=tiny("llama"), speculative_config=speculative, dtype="float32", **launcher)
        return asked.create_engine_config()

    with pytest.raises(ConfigError, match=r"control\.profile to the path"):
        configured({}, **arguments)
    for launcher, learns in ((arguments, False), ({"tensor_parallel_size": 2}, True)):
        config = configured({"profile": "one.json"}, **launcher)
        # Each rank sees step times of its own.
        assert control_settings(config.speculative_config.selfspec, config.parallel_config).learn is learns
