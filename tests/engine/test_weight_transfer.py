"""The file weight-transfer backend, through vLLM's official protocol, against a fresh engine on the new weights."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from engines import server
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from vllm_selfspec.compat import tied_lm_head
from vllm_selfspec.plugin import TIED_LM_HEAD
from vllm_selfspec.rollout import register_weight_transfer
from vllm_selfspec.rollout.transfer import FileTrainerInitInfo
from vllm_selfspec.rollout.weights import BACKEND, WeightStore

PROMPTS = [{"prompt_token_ids": list(range(start, start + 40))} for start in (3, 90, 200)]
Logprobs = list[dict[int, float]]


@contextlib.contextmanager
def engine(model: str, **arguments: Any) -> Iterator[LLM]:
    register_weight_transfer()
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=128,
        block_size=32,
        max_logprobs=256,
        kv_cache_memory_bytes=1 << 26,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        **arguments,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def all_logprobs(llm: LLM) -> torch.Tensor:
    """[prompts, tokens, vocabulary] log probabilities along one fixed continuation per prompt."""
    # A vocabulary's worth of log probabilities at every prompt position: the same context for any weights.
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=256, prompt_logprobs=256)
    rows = []
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        rows.append(torch.tensor([[position[token].logprob for token in range(256)] for position in positions]))
    return torch.stack(rows)


def update(llm: LLM, path: str | Path, version: str | None = None) -> None:
    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": str(path)}})
    llm.finish_weight_update(version)
    llm.reset_prefix_cache()


@pytest.mark.parametrize("selfspec", [True, False])
def test_weights_for_a_draft_model_are_refused_before_any_is_touched(tiny: Callable[..., str], selfspec: bool) -> None:
    """A view's layers are the target's: vLLM would prepare those for other weights."""
    own = {"method": "selfspec", "control": {"mode": "fixed"}}
    vllms = {"method": "draft_model", "model": tiny(), "num_speculative_tokens": 2}
    with engine(tiny(), speculative_config=own if selfspec else vllms) as llm:
        before = all_logprobs(llm)
        supported = llm.collective_rpc("supports_draft_weight_updates")
        if not selfspec:
            assert supported == [True]
            return
        assert supported == [False]
        with pytest.raises(Exception, match="method selfspec has no draft weights of its own"):
            llm.start_draft_weight_update()
        assert torch.equal(all_logprobs(llm), before)
        update(llm, tiny(seed=1))
        assert (all_logprobs(llm) - before).abs().max() > 1.0


@pytest.fixture(scope="module", params=["llama_tied", "llama"])
def swap(request: pytest.FixtureRequest, tiny: Callable[..., str]) -> Iterator[tuple[LLM, str, str, Any, Any]]:
    """An engine on old weights, old and new checkpoint, and the log probabilities of fresh engines on each."""
    old, new = tiny(request.param), tiny(request.param, seed=1)
    with engine(new) as fresh:
        want_new = all_logprobs(fresh)
    with engine(old) as llm:
        yield llm, old, new, all_logprobs(llm), want_new


def test_logits_after_the_update_are_those_of_a_fresh_engine(swap: tuple[LLM, str, str, Any, Any]) -> None:
    llm, old, new, want_old, want_new = swap
    assert (want_old - want_new).abs().max() > 1.0  # the test can fail
    update(llm, new, "7")
    torch.testing.assert_close(all_logprobs(llm), want_new, rtol=0, atol=1e-5)
    assert llm.get_weight_version() == "7"
    update(llm, old)
    torch.testing.assert_close(all_logprobs(llm), want_old, rtol=0, atol=1e-5)


def test_without_the_mend_a_tied_head_stays_old(
    swap: tuple[LLM, str, str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, old, new, want_old, want_new = swap
    tied = llm.llm_engine.model_config.hf_config.tie_word_embeddings
    with monkeypatch.context() as patch:
        patch.setattr(tied_lm_head, "repack", lambda model: 0)
        update(llm, new)
        wrong = (all_logprobs(llm) - want_new).abs().max()
    assert (wrong > 0.1) == tied
    update(llm, old)
    torch.testing.assert_close(all_logprobs(llm), want_old, rtol=0, atol=1e-5)


def test_a_refused_update_changes_nothing_and_the_next_one_works(
    swap: tuple[LLM, str, str, Any, Any], tmp_path: Path
) -> None:
    """A failed update used to leave buffered tensors behind that the next one mixed into its layers."""
    llm, old, new, want_old, _want_new = swap
    state = load_file(Path(new) / "model.safetensors")
    bad = dict(state)
    bad["model.layers.2.mlp.up_proj.weight"] = bad["model.layers.2.mlp.up_proj.weight"].clone()
    bad["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(bad, tmp_path / "nan.safetensors")
    with pytest.raises(Exception, match=r"tensor model.layers.2.mlp.up_proj.weight holds a non-finite value"):
        update(llm, tmp_path / "nan.safetensors")
    torch.testing.assert_close(all_logprobs(llm), want_old, rtol=0, atol=1e-5)

    # Half of the layers, then a tensor that vLLM's loader refuses: the layers are mixed now, until a whole update.
    half = {name: tensor for name, tensor in state.items() if "layers.0" in name or "q_proj" in name}
    half["model.layers.3.mlp.down_proj.weight"] = torch.ones(3, 3)
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(Exception):  # noqa: B017  (whatever type vLLM's loader raises)
        update(llm, tmp_path / "half.safetensors")
    all_logprobs(llm)
    update(llm, old)
    torch.testing.assert_close(all_logprobs(llm), want_old, rtol=0, atol=1e-5)


def test_several_parts_make_one_update(swap: tuple[LLM, str, str, Any, Any], tmp_path: Path) -> None:
    llm, old, new, _want_old, want_new = swap
    state = load_file(Path(new) / "model.safetensors")
    names = sorted(state)
    llm.start_weight_update()
    for part, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in chosen}, tmp_path / f"{part}.safetensors")
        llm.update_weights({"update_info": {"path": str(tmp_path / f"{part}.safetensors")}})
    llm.finish_weight_update()
    llm.reset_prefix_cache()
    torch.testing.assert_close(all_logprobs(llm), want_new, rtol=0, atol=1e-5)
    update(llm, old)


class Client:
    """vLLM's `VLLMWeightSyncClient` protocol over an engine in this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


def test_vllms_trainer_side_sends_a_module(swap: tuple[LLM, str, str, Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llm, old, new, _want_old, want_new = swap
    register_weight_transfer()
    trainer = WeightTransferTrainerFactory.trainer_init(
        FileTrainerInitInfo(str(tmp_path / "sent.safetensors"), rank=0),
        client=Client(llm),
        source=ModuleSource(AutoModelForCausalLM.from_pretrained(new)),
    )
    trainer.send_weights()
    llm.reset_prefix_cache()
    torch.testing.assert_close(all_logprobs(llm), want_new, rtol=0, atol=1e-5)
    update(llm, old)


def test_a_source_that_leaves_something_on_other_ranks_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    class Split(ModuleSource):
        def iter_full(self) -> Any:
            return ((name, tensor) for name, tensor in self._module.named_parameters() if name != "1.weight")

    path, calls = tmp_path / "sent.safetensors", []
    client = SimpleNamespace(
        init_weight_transfer_engine=lambda info: None, start_weight_update=lambda: calls.append("start")
    )
    register_weight_transfer()
    trainer = WeightTransferTrainerFactory.trainer_init(
        FileTrainerInitInfo(str(path), rank=0),
        client=client,
        source=Split(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))),
    )
    with pytest.raises(ValueError, match=r"source: rank 0 gets 3 parameters and not 1\.weight"):
        trainer.send_weights()
    assert not calls and not path.exists()


def test_the_mend_is_applied_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader.reload import layerwise

    wrapped = layerwise.finalize_layerwise_processing
    original = getattr(wrapped, "__wrapped__", wrapped)
    monkeypatch.setattr(layerwise, "finalize_layerwise_processing", original)
    assert tied_lm_head.broken()
    monkeypatch.setattr(tied_lm_head, "broken", lambda: False)
    TIED_LM_HEAD.apply()
    assert layerwise.finalize_layerwise_processing is original
    monkeypatch.undo()
    monkeypatch.setattr(layerwise, "finalize_layerwise_processing", original)
    TIED_LM_HEAD.apply()
    once = layerwise.finalize_layerwise_processing
    TIED_LM_HEAD.apply()
    assert layerwise.finalize_layerwise_processing is once is not original
    assert not tied_lm_head.broken()


def test_a_checkpoint_can_be_a_folder_of_shards(swap: tuple[LLM, str, str, Any, Any], tmp_path: Path) -> None:
    llm, old, new, _want_old, want_new = swap
    state = load_file(Path(new) / "model.safetensors")
    folder = tmp_path / "shards"
    folder.mkdir()
    names = list(state)
    save_file({name: state[name] for name in names[:7]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: state[name] for name in names[7:]}, folder / "model-00002-of-00002.safetensors")
    shutil.copy(Path(new) / "config.json", folder)
    update(llm, folder)
    torch.testing.assert_close(all_logprobs(llm), want_new, rtol=0, atol=1e-5)
    update(llm, old)


def completion(url: str) -> list[int]:
    request = {"model": "tiny", "prompt": list(range(3, 43)), "temperature": 0, "max_tokens": 8}
    request |= {"return_token_ids": True, "detokenize": False}
    response = httpx.post(f"{url}/v1/completions", json=request, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def test_a_real_trainer_updates_a_real_server(tiny: Callable[..., str], tmp_path: Path) -> None:
    """The plugin registers the backend in the server's processes; vLLM's own HTTP client drives the protocol."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("llama_tied", seed=1))
    prompt = torch.arange(3, 43)[None]
    want = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
    with server(tiny("llama_tied"), tmp_path / "server.log", "--weight-transfer-config.backend", BACKEND) as url:
        before = completion(url)
        register_weight_transfer()
        trainer = WeightTransferTrainerFactory.trainer_init(
            FileTrainerInitInfo(str(tmp_path / "sent.safetensors"), rank=0),
            client=HTTPVLLMWeightSyncClient(url),
            source=ModuleSource(model),
        )
        trainer.send_weights("1")
        httpx.post(f"{url}/reset_prefix_cache").raise_for_status()
        after = completion(url)
        assert httpx.get(f"{url}/weight_info").json() == {"weight_version": "1"}
    assert after == want[0, 40:].tolist() != before


def test_a_version_whose_number_comes_again_keeps_its_file(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    paths = []
    for version in (1, 2, 1, 2, 1):
        paths.append(store.put({"a": torch.full((2,), float(len(paths)))}, version))
        store.keep(paths[-1])
    assert [path.exists() for path in paths] == [False] * 3 + [True] * 2
