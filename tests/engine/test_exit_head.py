"""Trained exit heads: what they are trained on, that training helps, and that the engine drafts with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import drafter_of, engine, generate, greedy, random_prompt, watch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_selfspec.cli import main
from vllm_selfspec.config import ConfigError
from vllm_selfspec.drafter.exit_head import ExitHead, ExitHeadInfo, load, read_info, save
from vllm_selfspec.errors import UsageError
from vllm_selfspec.exit_training import Hidden, Target, collect, overlap, train

LAYER, HIDDEN = 2, 128
PROMPTS = [random_prompt(4 + 3 * number, number) for number in range(4)]
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=None)


def test_hidden_states_are_those_of_the_written_tokens(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of different lengths, padded on the left, and an answer that ended early."""
    target = Target.load(tiny("llama"), "cpu")
    answers = [random_prompt(6, 100 + number) for number in range(4)]
    answers[1][2:] = [9, 0, 0, 0]
    target.model.generation_config.eos_token_id = 9
    longest = max(map(len, PROMPTS))
    text = torch.tensor(
        [[0] * (longest - len(p)) + p + [t if t != 9 or i == 1 else 8 for t in a]
         for i, (p, a) in enumerate(zip(PROMPTS, answers, strict=True))]
    )  # fmt: skip
    monkeypatch.setattr(target.model, "generate", lambda *_, **__: text)
    hidden = collect(target, TOKENIZER, PROMPTS, LAYER, 10, 6, batch=4)

    early, last = [], []
    for row, prompt in enumerate(PROMPTS):
        length = 3 if row == 1 else 6
        whole = text[row, longest - len(prompt) :][: len(prompt) + length]
        with torch.no_grad():
            states = target.model(whole[None], output_hidden_states=True).hidden_states
        here = slice(len(prompt) - 1, len(whole) - 1)
        early.append(states[LAYER][0, here])
        last.append(states[-1][0, here])
    torch.testing.assert_close(hidden.early, torch.cat(early), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(target.norm(hidden.last), torch.cat(last), atol=1e-4, rtol=1e-4)
    assert hidden.prompt.tolist() == [0] * 6 + [1] * 3 + [2] * 6 + [3] * 6


def test_what_is_held_out_is_of_prompts_that_are_not_trained_on() -> None:
    rows = torch.arange(60.0)[:, None]
    hidden = Hidden(rows, rows + 100, torch.arange(60) % 20)
    seen, unseen = hidden.split(0.1)
    assert set(unseen.prompt.tolist()) == {18, 19} and set(seen.prompt.tolist()) == set(range(18))
    assert torch.equal(torch.cat([seen.early, unseen.early]).sort(dim=0).values, rows)
    assert torch.equal(unseen.last, unseen.early + 100)
    with pytest.raises(UsageError, match="at least two"):
        hidden.rows(hidden.prompt == 3).split(0.1)


@pytest.mark.parametrize(("family", "fits"), [("llama", True), ("qwen2", True), ("cohere", False), ("gemma2", False)])
def test_logits_that_are_shaped_further_are_refused(family: str, fits: bool, tiny: Callable[..., str]) -> None:
    """By a scale, or by a cap."""
    with nullcontext() if fits else pytest.raises(UsageError, match="LM head of final norm"):
        Target.load(tiny(family), "cpu")


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float, float, ExitHead]:
    """The file of a head for the tiny Llama; the overlap on held-out text without it and with it; the head."""
    torch.manual_seed(0)
    target = Target.load(tiny("llama"), "cpu")
    hidden = collect(target, TOKENIZER, PROMPTS, LAYER, 12_000, 64, batch=64)
    seen, unseen = hidden.rows(slice(2000, None)), hidden.rows(slice(2000))
    head = ExitHead(HIDDEN, 256)
    without = overlap(target, None, unseen)
    assert overlap(target, head, unseen) == pytest.approx(without)  # it begins as the identity
    losses = list(train(target, head, seen, 300, 256, 3e-3))
    assert sum(losses[-20:]) < sum(losses[:20])
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save(head, ExitHeadInfo("tiny", LAYER, HIDDEN, 256), path)
    return str(path), without, overlap(target, head, unseen), head


def test_training_raises_the_overlap_on_unseen_text(trained: tuple[str, float, float, ExitHead]) -> None:
    _, without, overlap_, _ = trained
    assert overlap_ > without + 0.05


@pytest.mark.parametrize("weights", ["native", "int8", "int4+int8"])
def test_the_engine_drafts_with_the_head(
    weights: str, trained: tuple[str, float, float, ExitHead], tiny: Callable[..., str]
) -> None:
    path, _, _, head = trained
    prompts = [random_prompt(8, 50 + number) for number in range(8)]
    # Overlaps differ from text to text, so on text like that which the engine will write.
    target = Target.load(tiny("llama"), "cpu")
    text = collect(target, TOKENIZER, prompts, LAYER, 8_000, 60, batch=64)
    without, expected = overlap(target, None, text), overlap(target, head, text)
    drafter: dict[str, Any] = {"weights": weights, "lm_head": "native", "exit_layer": LAYER, "exit_head": path}
    settings = {"num_speculative_tokens": 1, "drafter": drafter, "control": {"mode": "fixed"}}
    with engine(tiny("llama")) as llm:
        plain = generate(llm, prompts, greedy(40))
    with engine(tiny("llama"), settings) as llm:
        assert generate(llm, prompts, greedy(40)) == plain
        seen = watch(llm)
        generate(llm, prompts * 4, SamplingParams(temperature=1.0, max_tokens=60))
    # At temperature 1 the acceptance of one draft is the overlap; four bits lose some of it.
    assert seen.drafted > 500
    assert seen.acceptance == pytest.approx(expected, abs=0.12 if "int4" in weights else 0.06)
    assert seen.acceptance > without


@pytest.mark.parametrize("weights", ["native", "int8"])
def test_a_refresh_writes_the_head_again(
    weights: str, trained: tuple[str, float, float, ExitHead], tiny: Callable[..., str]
) -> None:
    """Deep sleep discards what the drafter has on a GPU, and no update of the target brings the head back."""
    drafter: dict[str, Any] = {"weights": weights, "lm_head": "native", "exit_layer": LAYER, "exit_head": trained[0]}
    with engine(tiny("llama"), {"drafter": drafter, "control": {"mode": "fixed"}}) as llm:
        head = drafter_of(llm).model.backbone.decoder.layers[-1]
        x = torch.randn(3, HIDDEN)
        before = head.change(x)
        head.norm.zero_()
        if weights == "native":
            head.up.weight.zero_()
            head.down.weight.zero_()
        else:
            head.up.state.refresh(torch.zeros(256, HIDDEN))
        assert not head.change(x).any() and before.any()
        llm.collective_rpc("selfspec_refresh")
        assert torch.equal(head.change(x), before)


def refusal(model: str, **drafter: Any) -> str:
    settings = {"method": "selfspec", "drafter": drafter}
    asked = EngineArgs(model=model, speculative_config=settings, dtype="float32", skip_tokenizer_init=True)
    with pytest.raises(ConfigError) as caught:
        asked.create_engine_config()
    return str(caught.value)


def test_a_head_that_does_not_fit_is_refused(
    trained: tuple[str, float, float, ExitHead], tiny: Callable[..., str], tmp_path: Path
) -> None:
    path, model = trained[0], tiny("llama")
    assert "set drafter.exit_layer to 2" in refusal(model, exit_head=path)
    assert "set drafter.exit_layer to 2" in refusal(model, exit_head=path, exit_layer=3)
    assert "leave out drafter.skip_layers" in refusal(model, exit_head=path, exit_layer=2, skip_layers=[0])
    other = tiny("llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    assert "of hidden size 128, but this model's is 64" in refusal(other, exit_head=path, exit_layer=2)
    assert "cannot be read" in refusal(model, exit_head=str(tmp_path / "none"), exit_layer=2)
    (weights,) = Path(model).glob("*.safetensors")
    assert "is not an exit head" in refusal(model, exit_head=str(weights), exit_layer=2)


def test_a_head_that_is_not_finite_is_refused(trained: tuple[str, float, float, ExitHead], tmp_path: Path) -> None:
    path, *_, head = trained
    broken = copy.deepcopy(head)
    broken.norm.data[3] = torch.nan
    save(broken, read_info(path), tmp_path / "broken")
    rest = "native", torch.zeros(1, dtype=torch.bool), torch.float32, torch.device("cpu")
    load(path, *rest)
    with pytest.raises(ConfigError, match="lower learning rate"):
        load(str(tmp_path / "broken"), *rest)


def test_the_command_trains_a_head_for_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "head.safetensors"
    options = ["--exit-layer", "20", "--tokens", "200", "--max-new-tokens", "24", "--batch", "4", "--steps", "5"]
    with pytest.raises(SystemExit) as done:
        main(["train-exit", *options, "--rows", "32", "--width", "100", "--out", str(out), "--json"])
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 200 <= told["tokens"] < 400 and 0 < told["overlap_without"] < 1 and 0 < told["overlap"] < 1
    assert read_info(str(out)) == ExitHeadInfo("smollm2-135m", 20, 576, 128)


def test_the_command_refuses_a_layer_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train-exit", "--exit-layer", "30", "--out", str(tmp_path / "head.safetensors")])
    assert done.value.code == 2
    assert "smollm2-135m has 30 layers" in capsys.readouterr().err
