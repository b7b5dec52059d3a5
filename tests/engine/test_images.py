"""Models that see images: their drafts are of text, behind images whose keys and values are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import emulated_cuda
import interpreted_triton
import pytest
import torch
from engines import (
    Job,
    drafter_of,
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
from test_cpu_layers import assert_close, differences
from tiny_vision import END, IMAGE, START, VISION, picture, without_torchvision, write_vision_checkpoint
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_selfspec.config import ConfigError
from vllm_selfspec.drafter import view
from vllm_selfspec.drafter.cpu_kernels import own_kernels
from vllm_selfspec.drafter.cpu_layers import DraftStack
from vllm_selfspec.drafter.proposer import SelfDraftProposer
from vllm_selfspec.plugin import older_than

pytestmark = pytest.mark.skipif(older_than("0.32"), reason="prepares images by another transformers")

FIXED: dict[str, Any] = {"num_speculative_tokens": 5, "control": {"mode": "fixed"}}
NATIVE = FIXED | {"drafter": {"weights": "native", "lm_head": "native"}}
WITH_IMAGES: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "limit_mm_per_prompt": {"image": 2},
    "max_num_batched_tokens": 256,
    "mm_encoder_attn_backend": "TORCH_SDPA",
}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """`seeing(family)`: path of a tiny random checkpoint, made once."""
    with without_torchvision():
        yield cache(lambda family: str(write_vision_checkpoint(tmp_path_factory.mktemp(family), family)))


def text(length: int) -> list[int]:
    return random_prompt(length, length, START)


IMAGE_HERE = [START, IMAGE, END]
PROMPTS = [
    (text(9), []),
    (text(5) + IMAGE_HERE + text(7), [picture(84, 140, 1)]),
    (IMAGE_HERE + text(11) + IMAGE_HERE, [picture(140, 56, 2), picture(56, 56, 3)]),
    ([*text(40), START, IMAGE], [picture(56, 168, 4)]),  # it ends with the image
]


def jobs(params: SamplingParams) -> list[Job]:
    return [Job(prompt, params, arrival=2 * i, images=images) for i, (prompt, images) in enumerate(PROMPTS)]


@pytest.mark.parametrize("family", VISION)
def test_a_whole_view_is_never_rejected(family: str, seeing: Callable[[str], str]) -> None:
    """With M-RoPE text behind an image has other rotary positions than places in the cache."""
    with engine(seeing(family), NATIVE, **WITH_IMAGES) as llm:
        seen = watch(llm, random_lengths(1, 5))
        drive(llm, jobs(SamplingParams(temperature=0.7, max_tokens=30)))
    assert seen.drafted > 60
    assert seen.accepted == seen.drafted


@pytest.mark.parametrize("family", VISION)
def test_greedy_text_is_that_of_the_model(family: str, seeing: Callable[[str], str]) -> None:
    with engine(seeing(family), **WITH_IMAGES) as llm:
        expected = texts(drive(llm, jobs(greedy(40))))
    with engine(seeing(family), FIXED, **WITH_IMAGES) as llm:
        seen = watch(llm, random_lengths(3, 5))
        assert texts(drive(llm, jobs(greedy(40)))) == expected
    assert 0.3 < seen.acceptance < 1.0
    assert len({tokens for output in expected for tokens, *_ in output}) == len(PROMPTS)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_what_the_adaptive_mode_learns_from(family: str, seeing: Callable[[str], str]) -> None:
    """Of its own prompts it may draw such that look like images; steps that encode images are not learnt from."""
    with engine(seeing(family), {}, **WITH_IMAGES) as llm:
        scheduler = scheduler_of(llm)
        assert scheduler._controller.times.cost_model is not None
        encoded: list[bool] = []
        learnt: list[bool] = []
        observe, observe_step = scheduler._observe, scheduler._controller.observe_step

        def observed(step: Any, result: Any) -> None:
            encoded.append(bool(step.output.scheduled_encoder_inputs))
            observe(step, result)

        def learn(observation: Any) -> None:
            learnt.append(encoded[-1])
            observe_step(observation)

        scheduler._observe, scheduler._controller.observe_step = observed, learn
        drive(llm, jobs(greedy(40)))
    assert sum(encoded) == 3
    assert len(learnt) > 5 and not any(learnt)


def test_a_tower_is_neither_quantized_nor_watched(seeing: Callable[[str], str]) -> None:
    """CLIP's layers have numbers, too, and its tensors come first."""
    with engine(seeing("llava"), FIXED | {"drafter": {"weights": "int8"}}, **WITH_IMAGES) as llm:
        model, tap = runner_of(llm).model, drafter_of(llm)._tap
        tower = [module for module in model.vision_tower.modules() if view.is_quantizable(module)]
        config = llm.llm_engine.vllm_config
        plan = view.quantization_plan(config, range(4), "int8", "int8", None)  # the tap's has forgotten them by now
        assert len(tower) > 4 and {plan(module) for module in tower} == {"native"}
        assert plan(model.language_model.model.layers[3].mlp.down_proj) == "int8"
        own = {id(parameter) for parameter in model.language_model.parameters()}
        assert tap._watched and all(id(tensor) in own for tensor in tap._watched)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_drafts_follow_an_update(family: str, seeing: Callable[[str], str], tmp_path: Path) -> None:
    path = write_vision_checkpoint(tmp_path, family, seed=1)
    with engine(seeing(family), FIXED, **WITH_IMAGES) as llm:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        seen = watch(llm)
        drive(llm, jobs(greedy(40)))
    assert seen.acceptance > 0.3  # none of what the old weights draft


@pytest.mark.skipif(not own_kernels() or emulated_cuda.wanted(), reason="no kernels of the package for this CPU")
@pytest.mark.skipif(interpreted_triton.on_runner_v2(), reason="on CPU runner V1 drafts")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_its_layers_are_one_operator_on_cpu(family: str, seeing: Callable[[str], str]) -> None:
    with engine(seeing(family), FIXED | {"drafter": {"weights": "int8"}}, **WITH_IMAGES) as llm:
        stack = drafter_of(llm).model.backbone.decoder.layers
        assert [type(part) for part in stack] == [DraftStack]
        assert_close(differences(llm), "float32")


def test_positions_that_are_not_one_number_are_refused(
    seeing: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as those of ERNIE-4.5-VL and openPangu-VL, whose rotary embeddings are other classes."""
    monkeypatch.setattr(view, "MRotaryEmbedding", type("Another", (view.MRotaryEmbedding,), {}))
    refused = pytest.raises(ConfigError, match=r"multi-dimensional rotary embedding \(MRotaryEmbedding\) is none")
    with refused, engine(seeing("qwen2_5_vl"), NATIVE, **WITH_IMAGES):
        pass


def test_pruned_videos_are_refused_where_vllm_forgets_rejections(seeing: Callable[[str], str]) -> None:
    arguments = EngineArgs(
        model=seeing("qwen2_5_vl"), speculative_config={"method": "selfspec", **NATIVE}, video_pruning_rate=0.5
    )
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ConfigError, match="video_pruning_rate needs async_scheduling to be off"):
        SelfDraftProposer(config, torch.device("cpu"))
