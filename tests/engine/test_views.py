"""A view of all layers at full precision is the model itself, for every family: it drafts what the target draws.

Where a class does something around its layers (scales the hidden states or the logits, adds a dimension, knows its
layers by other names), a view that leaves it out would draft from another distribution, which costs nothing but speed
and would go unnoticed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated_cuda
import pytest
import torch
from engines import Job, drafter_of, drive, engine, random_lengths, random_prompt, runner_of, watch
from tiny_models import FAMILIES, IN_TRANSFORMERS, MORE_FAMILIES, build_model
from torch import nn
from transformers import Gemma3nTextConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from vllm_selfspec.config import ConfigError
from vllm_selfspec.drafter.exit_head import ExitHead, ExitHeadInfo, fits_behind, save
from vllm_selfspec.drafter.experts import is_experts
from vllm_selfspec.drafter.view import DraftModel
from vllm_selfspec.plugin import older_than

NATIVE = {"weights": "native", "lm_head": "native"}
JOBS = [
    Job(random_prompt(length, length), SamplingParams(temperature=0.7, max_tokens=30), arrival=i)
    for i, length in enumerate((5, 90, 64))
]
# On CPU, with plain Llama weights: the class is known to vLLM alone.
MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "scale_emb": 3.0,
    "scale_depth": 1.4,
    "dim_model_base": 32,
    "hidden_act": "silu",
}


def settings(**drafter: Any) -> dict[str, Any]:
    return {"num_speculative_tokens": 5, "drafter": NATIVE | drafter, "control": {"mode": "fixed"}}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, "minicpm"])
def test_a_whole_view_is_never_rejected(family: str, tiny: Callable[..., str]) -> None:
    """Also: the flag alone takes models with windows on some of their layers."""
    if family in IN_TRANSFORMERS and older_than("0.32"):
        pytest.skip("refused on this vLLM")
    arguments: dict[str, Any] = {"hf_overrides": MINICPM} if family == "minicpm" else {}
    with engine(tiny("llama" if family == "minicpm" else family), settings(), **arguments) as llm:
        seen = watch(llm, random_lengths(1, 5))
        drive(llm, JOBS)
    assert seen.drafted > 60
    assert seen.accepted == seen.drafted


HEADS_FIT = {"llama": True, "gemma3": True, "granite": False, "exaone4": False, "cohere": False, "olmo2": False}


@pytest.mark.parametrize("family", HEADS_FIT)
def test_an_exit_head_needs_layers_that_add_to_a_residual(
    family: str, tiny: Callable[..., str], tmp_path: Path
) -> None:
    """Behind layers of another convention its last state would be normed alone, or not be taken at all."""
    if family in IN_TRANSFORMERS and older_than("0.32"):
        pytest.skip("refused on this vLLM")
    path = tmp_path / "head.safetensors"
    save(ExitHead(128, 64), ExitHeadInfo(family, 2, 128, 64), path)  # the identity
    if not HEADS_FIT[family]:
        refused = pytest.raises(ConfigError, match=r"drafter.exit_head does not work with \w+, whose layers")
        with refused, engine(tiny(family), settings(exit_layer=2, exit_head=str(path))):
            pass
        return
    drafts = []
    for drafter in ({"exit_layer": 2}, {"exit_layer": 2, "exit_head": str(path)}):
        with engine(tiny(family), settings(**drafter)) as llm:
            seen = watch(llm)
            drive(llm, [Job(random_prompt(20, 1), SamplingParams(temperature=0.0, max_tokens=40))])
            drafts.append((seen.drafted, seen.accepted))
    assert drafts[0] == drafts[1] and drafts[0][1] > 0


@pytest.mark.parametrize("experts", ["native", None], ids=["experts as they are", "experts of their own"])
def test_what_a_mixture_looks_up_by_name(experts: str | None, tiny: Callable[..., str]) -> None:
    """vLLM finds the experts, the shared one among them, by the layer's name: what is quantized needs another one."""
    with engine(tiny("qwen2_moe"), settings(weights="int8", lm_head="int8", experts=experts)) as llm:
        seen = watch(llm, lambda: 4)
        drive(llm, JOBS)
        assert seen.acceptance > 0.6
        states = drafter_of(llm)._tap._states
        quantized = [getattr(layer, "prefix", "") for layer in states]
        assert sum("qkv_proj" in name for name in quantized) == 4
        assert sum("self_attn.o_proj" in name for name in quantized) == 4
        own = 0 if experts == "native" or (current_platform.is_cpu() and older_than("0.32")) else 4
        assert sum("shared_expert." in name for name in quantized) == 2 * own
        assert sum(map(is_experts, states)) == own
        names = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        drafting = [layer for name, layer in names.items() if name.endswith("experts.selfspec")]
        assert len(drafting) == own
        for layer in drafting:
            of_the_target = names[layer.layer_name.removesuffix(".selfspec")]
            assert type(of_the_target.routed_experts.quant_method) is UnquantizedFusedMoEMethod
            assert layer.router is of_the_target.router


@pytest.mark.skipif(emulated_cuda.wanted(), reason="what is refused depends on the device")
@pytest.mark.skipif(older_than("0.32"), reason="refused for another reason: experts are chosen inside of the kernel")
@pytest.mark.parametrize(
    ("width", "asked", "reason"),
    [
        (
            60,
            {"experts": "int8"},
            "they are 60 wide on each device and the model 128, which must be",
        ),
        (64, {"experts": "fp8"}, "nothing multiplies with experts at fp8 here"),
    ],
)
def test_experts_that_cannot_be_quantized(
    width: int, asked: dict[str, str], reason: str, tiny: Callable[..., str]
) -> None:
    """Who asks for it is told why not, in one sentence."""
    sentence = f"^drafter.experts cannot be '{asked['experts']}', because {reason}.*: set it to 'native'.$"
    refused = pytest.raises(ConfigError, match=sentence)
    with refused, engine(tiny("qwen3_moe", moe_intermediate_size=width), settings(**asked)):
        pass


@pytest.mark.skipif(emulated_cuda.wanted(), reason="what is refused depends on the device")
def test_who_does_not_ask_for_it_drafts_with_such_experts_as_they_are(tiny: Callable[..., str]) -> None:
    with engine(tiny("qwen3_moe", moe_intermediate_size=60), settings(weights="int8")) as llm:
        seen = watch(llm, lambda: 4)
        drive(llm, JOBS)
        assert seen.acceptance > 0.6
        assert len(drafter_of(llm)._tap._states) == 8


def test_what_the_view_does_not_use_is_forgotten(tiny: Callable[..., str]) -> None:
    """A tower has layers of the same numbers, which are quantized before anybody knows that they do not draft."""
    with engine(tiny("llama"), settings(weights="int8", exit_layer=2)) as llm:
        tap = drafter_of(llm)._tap
        kept = set(tap._states)
        drafting = {
            module.quant_method.state
            for module in drafter_of(llm).model.modules()
            if hasattr(getattr(module, "quant_method", None), "state")
        }
        assert set(tap._states.values()) == drafting and len(kept) == 8
        tower = nn.Linear(64, 64, bias=False)
        tap.capture(tower, tower.weight)
        assert set(tap._states) == kept
        llm.collective_rpc("reload_weights")
        assert set(tap._states) == kept
        target = runner_of(llm).model
        assert isinstance(target.lm_head.weight, torch.Tensor) and fits_behind(target.model, llm.model_config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_drafts_are_numbers(dtype: torch.dtype) -> None:
    """vLLM's rejection sampler is not exact with a q that is none."""
    spoilt = torch.tensor([[1.0, torch.nan, 2.0, -torch.inf], [1.0, torch.inf, 2.0, 3.0]], dtype=dtype)
    head = SimpleNamespace(compute_logits=lambda hidden: spoilt.clone())
    logits = DraftModel(nn.Identity(), head).compute_logits(torch.zeros(2, 8))
    probs = (logits.float() / 0.01).softmax(dim=-1)
    assert probs.isfinite().all() and probs.argmax(dim=-1).tolist() == [2, 1]
    assert torch.equal(logits[0, ::2], spoilt[0, ::2]) and probs[0, 3] == 0


def test_the_same_arguments_make_one_config_after_another(tiny: Callable[..., str]) -> None:
    arguments = EngineArgs(
        model=tiny("gemma3"), dtype="float32", skip_tokenizer_init=True, speculative_config={"method": "selfspec"}
    )
    for _ in range(2):
        assert arguments.create_engine_config().scheduler_config.disable_hybrid_kv_cache_manager
    arguments.speculative_config = {"method": "selfspec", "drafter": {"exit_layer": 9}}
    with pytest.raises(ConfigError, match="exit_layer"):
        arguments.create_engine_config()
    arguments.speculative_config = {"method": "selfspec", "drafter": {"exit_layer": 2}}
    assert arguments.create_engine_config().speculative_config.selfspec.drafter.exit_layer == 2
    for copied in (arguments, replace(arguments), EngineArgs(**vars(arguments)), pickle.loads(pickle.dumps(arguments))):
        again = copied.create_engine_config()
        assert again.speculative_config.selfspec and again.scheduler_config.disable_hybrid_kv_cache_manager
        copied.speculative_config = None
        plain = copied.create_engine_config()
        assert plain.speculative_config is None and plain.scheduler_config.scheduler_cls is None
        assert copied.disable_hybrid_kv_cache_manager is None
    arguments.speculative_config = {"method": "selfspec"}
    arguments.create_engine_config()
    arguments.scheduler_cls = "vllm.v1.core.sched.scheduler.Scheduler"  # the user's own, set in between
    with pytest.raises(ConfigError, match="scheduler_cls"):
        arguments.create_engine_config()


class Stack(nn.Module):
    """A decoder whose layers are called with the arguments in a given order."""

    def __init__(self, states_first: bool) -> None:
        super().__init__()
        self.layers, self.norm, self.states_first = nn.ModuleList(), nn.LayerNorm(16), states_first

    def forward(self, input_ids: Any, positions: torch.Tensor, _: Any, hidden: torch.Tensor) -> torch.Tensor:
        residual = None
        for layer in self.layers:
            arguments = (hidden, positions) if self.states_first else (positions, hidden)
            hidden, residual = layer(*arguments, residual)
        return self.norm(hidden + residual)


@pytest.mark.parametrize("states_first", [False, True])
def test_a_head_is_not_put_where_it_would_be_called_with_other_arguments(states_first: bool) -> None:
    config = SimpleNamespace(get_hidden_size=lambda: 16, dtype=torch.float32)
    assert fits_behind(Stack(states_first), config) != states_first


def test_a_model_that_runs_its_layers_by_another_way_is_refused(tiny: Callable[..., str], tmp_path: Path) -> None:
    """Gemma 3n keeps what it runs in two stacks of their own: other layers in `model.layers` would change nothing."""
    config = Gemma3nTextConfig(
        **{"vocab_size": 256, "vocab_size_per_layer_input": 256, "hidden_size": 128, "intermediate_size": 192},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        **{"hidden_size_per_layer_input": 32, "laurel_rank": 8, "num_kv_shared_layers": 0, "sliding_window": 48},
        **{"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "activation_sparsity_pattern": [0.0] * 4},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "dtype": "float32"},
    )
    build_model(config, seed=0).save_pretrained(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"Gemma3nForCausalLM, which does not run its layers by way of model\.layers:"),
        engine(str(tmp_path), settings(exit_layer=2)),
    ):
        pass
