"""The drafter's operators on CPU compute what vLLM's layers compute: attention to the bit, whole layers to rounding."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Job, drafter_of, drive, engine, greedy, random_lengths, random_prompt, runner_of, texts, watch
from vllm import LLM, SamplingParams

from vllm_selfspec.config import ConfigError
from vllm_selfspec.drafter import cpu_layers, proposer, quantize, view
from vllm_selfspec.drafter.cpu_kernels import own_kernels

pytestmark = pytest.mark.skipif(not own_kernels(), reason="no kernels of the package for this CPU")

WINDOW = 40
SETTINGS = {"num_speculative_tokens": 5, "control": {"mode": "fixed"}}
JOBS = [
    Job(random_prompt(length, length), greedy(50) if i % 2 else SamplingParams(max_tokens=50, seed=i), arrival=3 * i)
    for i, length in enumerate((5, 90, 64, 31))
]


def draft_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits of every draft of a workload of chunked prefill, block boundaries and changing batches."""
    seen: list[torch.Tensor] = []
    sample_drafts = proposer.sample_drafts

    def recorded(logits: torch.Tensor, *args: Any) -> Any:
        seen.append(logits.clone())
        return sample_drafts(logits, *args)

    with monkeypatch.context() as patch:
        patch.setattr(proposer, "sample_drafts", recorded)
        torch.manual_seed(0)
        watch(llm, random_lengths(2, 5))
        drive(llm, JOBS)
    return seen


@pytest.mark.parametrize(
    ("family", "shape", "drafter"),
    [
        ("llama", {}, {"weights": "int8", "lm_head": "int8"}),
        ("llama", {"num_key_value_heads": 4}, {"weights": "native", "lm_head": "native", "exit_layer": 2}),
        ("qwen3", {}, {"weights": "native", "lm_head": "native", "skip_layers": [1]}),
        ("mistral", {"sliding_window": WINDOW}, {"weights": "int8", "lm_head": "int8"}),
        ("gemma2", {"sliding_window": WINDOW}, {"weights": "int8", "lm_head": "int8"}),
    ],
)
def test_drafts_are_those_of_vllms_layers(
    family: str,
    shape: dict[str, Any],
    drafter: dict[str, Any],
    tiny: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = {"max_num_batched_tokens": 64, "disable_hybrid_kv_cache_manager": True}
    monkeypatch.setattr(cpu_layers, "is_one_operator", lambda layer: False)
    with engine(tiny(family, **shape), SETTINGS | {"drafter": drafter}, **arguments) as llm:
        assert isinstance(drafter_of(llm).model.draft_layers, cpu_layers.DraftLayers)
        by_operator = draft_logits(llm, monkeypatch)
    monkeypatch.setattr(view, "usable_for", lambda layers: False)
    with engine(tiny(family, **shape), SETTINGS | {"drafter": drafter}, **arguments) as llm:
        assert drafter_of(llm).model.draft_layers is None
        by_layers = draft_logits(llm, monkeypatch)
    assert len(by_operator) == len(by_layers) > 50
    assert all(map(torch.equal, by_operator, by_layers))


def differences(llm: LLM, steps: list[bool] | None = None) -> list[float]:
    """For each draft of a workload, how far its hidden states are from those of the modules that the operator replaces.

    Relative to their size. Both run over the same batch and the same KV cache.

    Args:
        steps: whether the light view runs, for each step of the engine; the drafter's own choice by default.
    """
    model = drafter_of(llm).model
    decoder, whole = model.backbone.decoder, model.forward
    seen: list[float] = []

    def compared(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        model._choose_view(len(input_ids))
        hidden, residual = decoder.embed_tokens(input_ids), None
        for part in decoder.layers:
            for layer in part.layers if isinstance(part, cpu_layers.DraftStack) else [part]:
                hidden, residual = layer(positions, hidden, residual)
        expected = decoder.norm(hidden, residual)[0]
        result = whole(input_ids, positions)
        seen.append(float((result - expected).norm() / expected.norm()))
        return result

    model.forward = compared
    watch(llm, random_lengths(2, 5), light=None if steps is None else iter(steps).__next__)
    drive(llm, JOBS)
    del model.forward
    return seen


def assert_close(seen: list[float], dtype: str) -> None:
    """Most differences are of the type's rounding, more where that pushes a value past the middle of two integers."""
    assert len(seen) > 50
    middle, most = (1e-6, 2e-2) if dtype == "float32" else (4e-2, 8e-2)
    assert statistics.median(seen) < middle
    assert max(seen) < most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "shape", "drafter"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"weights": "int4+int8"}),
        ("llama", {"intermediate_size": 200, "num_key_value_heads": 1}, {"weights": "int8", "skip_layers": [1]}),
        ("qwen2", {"max_position_embeddings": 512}, {"weights": "int4", "exit_layer": 3}),
        ("qwen3", {}, {"weights": "int8"}),
        ("mistral", {"sliding_window": WINDOW}, {"weights": "int4+int8"}),
        ("phi3", {}, {"weights": "int8"}),
    ],
)
def test_layers_compute_what_their_modules_do(
    family: str, shape: dict[str, Any], drafter: dict[str, Any], dtype: str, tiny: Callable[..., str]
) -> None:
    with engine(tiny(family, **shape), SETTINGS | {"drafter": drafter}, dtype=dtype) as llm:
        stack = drafter_of(llm).model.backbone.decoder.layers
        assert [type(part) for part in stack] == [cpu_layers.DraftStack]
        light = [i % 2 == 0 for i in range(1000)] if drafter["weights"] == "int4+int8" else None
        seen = differences(llm, light)
    assert_close(seen, dtype)


@pytest.mark.parametrize("weights", ["int8", "int4", "int4+int8"])
def test_layers_by_the_kernels_for_avx2(
    weights: str, tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "own_kernels", lambda: "avx2")
    with engine(tiny(), SETTINGS | {"drafter": {"weights": weights, "lm_head": weights}}) as llm:
        stack = drafter_of(llm).model.backbone.decoder.layers[0]
        assert not stack.layers[0].mlp.down_proj.quant_method.state.operator.startswith("avx512")
        assert_close(differences(llm), "float32")


def test_layers_of_another_kind_stay_modules(tiny: Callable[..., str]) -> None:
    """Gemma 2 norms what its layers give, too, and weights at the model's precision are for its own products."""
    settings = SETTINGS | {"drafter": {"weights": "int8"}}
    with engine(tiny("gemma2"), settings, disable_hybrid_kv_cache_manager=True) as llm:
        assert not any(isinstance(m, cpu_layers.DraftStack) for m in drafter_of(llm).model.modules())
    with engine(tiny(), settings | {"drafter": {"weights": "native", "exit_layer": 2}}) as llm:
        assert not any(isinstance(m, cpu_layers.DraftStack) for m in drafter_of(llm).model.modules())


def test_layers_are_put_together_up_to_one_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [True, True, False, True]

    class Layer(torch.nn.Module):
        def __init__(self, place: int) -> None:
            super().__init__()
            self.self_attn = torch.nn.Module()
            self.self_attn.attn = SimpleNamespace(place=place)

    layers = [Layer(place) for place in range(4)]
    monkeypatch.setattr(cpu_layers, "is_one_operator", lambda layer: kinds[layer.self_attn.attn.place])
    monkeypatch.setattr(cpu_layers.Parts, "of", lambda layer: layer)
    parts = cpu_layers.DraftLayers().stack(layers)
    assert [list(part.layers) if isinstance(part, cpu_layers.DraftStack) else part for part in parts] == [
        layers[:2],
        layers[2],
        layers[3:],
    ]
    assert [part.place for part in (parts[0], parts[2])] == [0, 3]


def test_new_parameters_are_noticed(tiny: Callable[..., str]) -> None:
    """A norm of the target or a bias of the view that is put in another tensor is what drafts use from then on."""
    with engine(tiny("qwen2"), SETTINGS | {"drafter": {"weights": "int8"}}) as llm:
        assert_close(differences(llm), "float32")
        (stack,) = drafter_of(llm).model.backbone.decoder.layers
        norms = [layer.post_attention_layernorm for layer in runner_of(llm).model.model.layers]
        projections = [layer.self_attn.qkv_proj for layer in stack.layers]
        for modules, name in ((norms, "weight"), (projections, "bias")):
            for module in modules:
                setattr(module, name, torch.nn.Parameter(torch.randn_like(getattr(module, name)), requires_grad=False))
            assert_close(differences(llm), "float32")


@pytest.mark.parametrize(("family", "shape"), [("gemma2", {}), ("mistral", {"sliding_window": 48}), ("llama", {})])
def test_the_drafters_plan_assumes_the_window_that_its_layers_share(
    family: str, shape: dict[str, Any], tiny: Callable[..., str]
) -> None:
    """vLLM makes it when it knows the first layer alone, whose window other layers need not have."""
    with engine(tiny(family, **shape), SETTINGS) as llm:
        ((target,),) = runner_of(llm).attn_groups
        (group,) = drafter_of(llm).draft_attn_groups
        assert group.get_metadata_builder().window_size == target.get_metadata_builder().window_size
        assert (group.get_metadata_builder().window_size == -1) == (family != "mistral")


def test_layers_of_different_shapes_are_refused(tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan has one size of scratch memory."""
    shapes = {
        name: SimpleNamespace(num_heads=4, num_kv_heads=heads, head_size=32) for name, heads in (("a", 2), ("b", 1))
    }
    monkeypatch.setattr(proposer, "get_layers_from_vllm_config", lambda *_: shapes)
    with pytest.raises(ConfigError, match="layers of one shape"), engine(tiny("llama"), SETTINGS):
        pass


def test_new_caches_are_noticed(tiny: Callable[..., str]) -> None:
    """The drafter goes on in the KV cache that its target's layers have now, not in the one that it first saw."""
    settings = SETTINGS | {"drafter": {"weights": "native", "lm_head": "native", "exit_layer": 2}}
    job = [Job(random_prompt(40, 1), greedy(40))]
    with engine(tiny(), settings) as llm:
        expected, seen = texts(drive(llm, job)), watch(llm)
        assert texts(drive(llm, job)) == expected
        accepted = seen.accepted
        runner = runner_of(llm)
        for index, cache in enumerate(runner.kv_caches):
            runner.kv_caches[index] = cache.clone()
        for attention in drafter_of(llm).model.draft_layers._copies:
            attention.kv_cache = next(
                new for new in runner.kv_caches if torch.equal(new, attention.kv_cache) and new.shape
            )
        seen = watch(llm)
        assert texts(drive(llm, job)) == expected
        assert seen.accepted == accepted > 0
