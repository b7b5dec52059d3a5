"""A cheaper view of the target: fewer layers, fewer bits, or both, sharing everything else.

The view is made of shallow copies of the target's modules. Norms, rotary tables, embeddings and the attention modules
are the target's own objects, so the view reads and writes the target's paged KV cache under the target's layer names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_selfspec.config import ConfigError, Precision
from vllm_selfspec.drafter.cpu_layers import DraftLayers, usable_for
from vllm_selfspec.drafter.exit_head import fits_behind
from vllm_selfspec.drafter.exit_head import load as load_exit_head
from vllm_selfspec.drafter.experts import DrafterExpertsMethod, is_experts, why_native
from vllm_selfspec.drafter.quantize import FEW_ROWS, QuantizedLinear, usable_precisions
from vllm_selfspec.drafter.refresh import WeightTap, language_model

logger = init_logger("vllm.selfspec")

_BOUND = 3e4
"""A logit that every dtype can hold and no other comes near."""


class DrafterLinearMethod:
    """Stands where a linear layer's `quant_method` stands; applies the drafter's weight instead of the layer's own."""

    def __init__(self, state: QuantizedLinear) -> None:
        self.state = state

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # On CPU vLLM keeps the bias of a small layer in float32.
        return self.state.apply(x, None if bias is None else bias.to(x.dtype))


def is_quantizable(module: nn.Module) -> bool:
    """True for the large linear layers that vLLM runs unquantized (a mixture's router is left alone)."""
    return isinstance(module, ColumnParallelLinear | RowParallelLinear) and isinstance(
        module.quant_method, UnquantizedLinearMethod
    )


def shallow_copy(module: nn.Module) -> Any:
    """A module with its own tables of parameters, buffers and children, which hold the same objects."""
    clone = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        setattr(clone, table, dict(getattr(module, table)))
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:  # such as a forward of the Transformers backend
            setattr(clone, name, MethodType(value.__func__, clone))
    return clone


def copy_with(module: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """`module` itself if `replace` leaves all that it holds, else a shallow copy that holds the replacements."""
    replacement = replace(module)
    if replacement is not module:
        return replacement
    children = {name: copy_with(child, replace) for name, child in module.named_children()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    clone = shallow_copy(module)
    clone._modules.update(children)
    return clone


def without_compiler(module: nn.Module) -> nn.Module:
    """`module`, of a class in which a call is the forward itself and not vLLM's compiled graph of it."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__call__": nn.Module.__call__})
    return module


def lm_head_path(top: nn.Module) -> str:
    """Where a language model keeps the layer that makes its logits.

    Raises:
        ConfigError: if it is in none of the known places.
    """
    # Models that are always tied may know their head by no name but the embedding's (Gemma 2, Cohere).
    for path in ("lm_head", "output", "model.embed_tokens"):
        owner, _, name = path.rpartition(".")
        if isinstance(getattr(getattr(top, owner) if owner else top, name, None), VocabParallelEmbedding):
            return path
    raise ConfigError(f"drafter.lm_head cannot be quantized for {type(top).__name__}: set it to 'native'.")


def with_submodule(module: nn.Module, path: str, submodule: nn.Module) -> nn.Module:
    """A shallow copy of `module` that holds `submodule` at `path`, and shallow copies of what is between."""
    name, _, rest = path.partition(".")
    clone = shallow_copy(module)
    clone._modules[name] = with_submodule(module._modules[name], rest, submodule) if rest else submodule
    return clone


def quantization_plan(
    vllm_config: VllmConfig, layers: Sequence[int], weights: Precision, lm_head: Precision, experts: Precision | None
) -> Callable[[nn.Module], Precision]:
    """Which precision the drafter uses for a layer of the target, told by the layer's type and place.

    On CPU `int4` leaves the projections to query, key and value at int8. They are a fourteenth of the weights of
    Qwen2.5-Coder-0.5B and cause a fifth of what int4 loses in acceptance: docs/measurements.md.

    Args:
        experts: of a mixture; None: that of the weights, if they can be quantized.
    """
    wanted = set(layers)
    projections = weights
    device_type = vllm_config.device_config.device_type
    if "int4" in weights and device_type == "cpu" and "int8" in usable_precisions(device_type):
        projections = "int8"

    def plan(module: nn.Module) -> Precision:
        if isinstance(module, ParallelLMHead):
            return lm_head
        name = module.layer_name if is_experts(module) else module.prefix if is_quantizable(module) else ""
        # A tower that sees images may have layers of the same numbers, in none of a decoder's places.
        place = re.search(r"(?:^|\.)model\.layers\.(\d+)\.", name)
        if place is None or int(place[1]) not in wanted:
            return "native"
        if is_experts(module):
            return plan_experts(module)
        return projections if isinstance(module, QKVParallelLinear) else weights

    def plan_experts(module: nn.Module) -> Precision:
        precision = experts or weights
        reason = "" if precision == "native" else why_native(module, vllm_config, precision)
        if reason and experts is not None:
            raise ConfigError(f"drafter.experts cannot be {experts!r}, because {reason}: set it to 'native'.")
        if reason:
            logger.info_once("selfspec drafts with the experts as they are, because %s.", reason)
        return "native" if reason else precision

    return plan


class _Reached(Exception):
    """A forward pass has come to its first layer."""


class _Signal(nn.Module):
    def forward(self, *_: Any, **__: Any) -> None:
        raise _Reached


@torch.inference_mode()
def runs_its_layers(inner: nn.Module) -> bool:
    """Whether a decoder stack that has its layers under other names, too, runs those of `layers`.

    Gemma 4 does, unless told otherwise; Gemma 3n does not.
    """
    decoder = shallow_copy(inner)
    decoder.layers = nn.ModuleList([_Signal() for _ in inner.layers])
    tokens = torch.zeros(2, dtype=torch.int64, device=next(inner.parameters()).device)
    try:
        decoder.forward(tokens, tokens, None)
    except _Reached:
        return True
    except Exception:  # of what it runs instead, outside of a step
        pass
    return False


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class DraftBackbone(nn.Module):
    """A view up to the LM head, compiled under its own name, so that its graph is not taken for the target's.

    Args:
        model: a language model whose `model` is the view's decoder stack. Its own forward is run, for what some classes
            do around the stack (MiniCPM scales what comes out, vLLM's Transformers backend adds a batch dimension).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def decoder(self) -> Any:
        """The view's decoder stack."""
        return self.model.model

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden_size] as the LM head takes them, of tokens [T] at positions [T]."""
        return self.model.forward(input_ids, positions, None)


class DraftModel(nn.Module):
    """What vLLM's runner sees as the drafter's model.

    It has no `load_weights`: the target's loader must never reach the drafter through it.
    """

    supports_multimodal_embeddings = True
    """It needs none: what it would see of an image is in the KV cache. vLLM warns of drafters that cannot take them."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        draft_layers: DraftLayers | None = None,
        light_runs: torch.Tensor | None = None,
    ) -> None:
        """From a stack and what makes logits.

        Args:
            draft_layers: of the stack; None where its attention layers are the target's own.
            light_runs: bool [1] that tells the weights which view runs; None where the drafter has but one.
        """
        super().__init__()
        self.backbone = backbone
        self._head = (head,)  # not registered: its parameters are the target's
        self.draft_layers = draft_layers
        self._light_runs = light_runs
        self.light: bool | None = None
        """Which view runs, where there are two; None: the light one while it has few rows."""
        self.logits_dtype: torch.dtype | None = None
        """Of what `compute_logits` returns; None: as the head computes them."""

    @property
    def has_light_view(self) -> bool:
        """True where weights are kept at two precisions."""
        return self._light_runs is not None

    def _choose_view(self, rows: int) -> None:
        if self._light_runs is not None:
            self._light_runs.fill_(rows <= FEW_ROWS if self.light is None else self.light)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert inputs_embeds is None, "the self-drafter embeds its own tokens"
        self._choose_view(len(input_ids))
        return self.backbone(input_ids, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocab_size] of hidden states [T, hidden_size], all of them numbers.

        With others vLLM's rejection sampler would not be exact: a view may overflow where the target does not.
        """
        self._choose_view(len(hidden_states))
        logits = self._head[0].compute_logits(hidden_states)
        logits.nan_to_num_(nan=0.0, posinf=_BOUND, neginf=-_BOUND)
        return logits if self.logits_dtype is None else logits.to(self.logits_dtype)


def build_view(
    target: nn.Module,
    vllm_config: VllmConfig,
    layers: Sequence[int],
    weights: Precision,
    lm_head: Precision,
    tap: WeightTap,
    exit_head: str | None = None,
    begins_batches: bool = False,
) -> tuple[DraftModel, set[str]]:
    """The drafter's model and the names of the attention layers it shares with the target.

    Args:
        exit_head: path of a trained head between the last of the layers and the final norm.
        begins_batches: the caller runs the model inside `draft_layers.batch`, where the model comes to have
            `draft_layers`.

    Raises:
        ConfigError: if this model class cannot be viewed.
    """
    top = language_model(target)
    inner: Any = getattr(top, "model", None)
    stack = getattr(inner, "layers", None)
    if not isinstance(stack, nn.ModuleList) or not hasattr(top, "compute_logits"):
        raise ConfigError(
            f"method selfspec cannot make a view of {type(target).__name__}, which has no model.layers and "
            "compute_logits: remove the speculative config for this model."
        )
    paths = [path for path, module in inner.named_modules(remove_duplicate=False) if module is stack[0]]
    if len(paths) > 1 and not runs_its_layers(inner):
        raise ConfigError(
            f"method selfspec cannot make a view of {type(target).__name__}, which does not run its layers by way of "
            "model.layers: remove the speculative config for this model."
        )
    chosen = [stack[layer] for layer in layers]
    if weights != "native" and not any(is_quantizable(m) for layer in chosen for m in layer.modules()):
        raise ConfigError(
            f"drafter.weights cannot be {weights!r} for this checkpoint of {type(target).__name__}, whose linear "
            "layers are all quantized already: set it to 'native' and draft with exit_layer or skip_layers, or serve "
            "the checkpoint that is not quantized."
        )
    logits_layer = top.get_submodule(lm_head_path(top)) if lm_head != "native" else None
    # A head that a quantized checkpoint leaves out has the method of a linear layer.
    unquantized = UnquantizedEmbeddingMethod | UnquantizedLinearMethod
    if logits_layer is not None and not isinstance(logits_layer.quant_method, unquantized):
        raise ConfigError("drafter.lm_head cannot be quantized a second time on this checkpoint: set it to 'native'.")

    shared = [m for layer in chosen for m in layer.modules() if isinstance(m, AttentionLayerBase)]
    if not shared:  # the Transformers backend of vLLM 0.29
        raise ConfigError(
            f"method selfspec cannot make a view of {type(target).__name__}, whose attention is outside of its layers "
            "in this vLLM: use 0.32 or newer, or remove the speculative config for this model."
        )
    model_config = vllm_config.model_config
    if model_config.uses_mrope or getattr(model_config, "uses_xdrope_dim", 0):  # XD-RoPE: before vLLM 0.32
        rotary = {type(m) for layer in chosen for m in layer.modules() if isinstance(m, RotaryEmbeddingBase)}
        if rotary != {MRotaryEmbedding}:  # which takes the position of text as one number
            names = ", ".join(sorted(kind.__name__ for kind in rotary)) or "none that vLLM knows"
            raise ConfigError(
                f"method selfspec cannot make a view of {type(target).__name__}, whose multi-dimensional rotary "
                f"embedding ({names}) is none that it drafts with: remove the speculative config for this model."
            )
    draft_layers = DraftLayers() if begins_batches and usable_for(shared) else None
    used: list[nn.Module] = []

    def has_quantized_experts(module: nn.Module) -> bool:
        routed = getattr(module, "routed_experts", None)
        return isinstance(module, MoERunnerInterface) and routed is not None and tap.plan(routed) != "native"

    # Attention, and experts that stay as they are, are found again by the target's names for them, and with them what
    # they hold.
    by_name = [m for layer in chosen for m in layer.modules() if isinstance(m, AttentionLayerBase | MoERunnerInterface)]
    of_the_target = {id(part) for m in by_name if not has_quantized_experts(m) for part in m.modules()}

    def replace(module: nn.Module) -> nn.Module:
        if draft_layers is not None and isinstance(module, Attention):
            return draft_layers.attention(module)
        if has_quantized_experts(module):
            used.append(module.routed_experts)
            return named_experts(module)
        if weights == "native" or id(module) in of_the_target or not is_quantizable(module):
            return module
        used.append(module)
        clone = shallow_copy(module)
        # Few classes do not tell their parts which layer they are of, which the plan goes by.
        clone.quant_method = DrafterLinearMethod(tap.state(module, weights if tap.plan(module) == "native" else None))
        return clone

    def named_experts(runner: Any) -> Any:
        """A layer of experts for the view, known to vLLM by a name of its own: graphs find theirs by it."""
        clone = shallow_copy(runner)
        clone.layer_name = f"{runner.layer_name}.selfspec"
        clone.routed_experts = experts = shallow_copy(runner.routed_experts)
        del experts._modules["quant_method"]  # a module itself, unlike the drafter's
        experts.quant_method = DrafterExpertsMethod(runner.moe_config, tap.state(runner.routed_experts))
        if runner.shared_experts is not None:
            clone._modules["_shared_experts"] = copy_with(runner.shared_experts, replace)
        names = vllm_config.compilation_config.static_forward_context
        assert clone.layer_name not in names
        names[clone.layer_name] = clone
        return clone

    decoder = shallow_copy(inner)
    viewed = [copy_with(layer, replace) for layer in chosen]
    if draft_layers is not None and vllm_config.lora_config is None:  # adapters work on a layer's parts
        viewed = draft_layers.stack(viewed)
    decoder.layers = nn.ModuleList(viewed)
    if exit_head is not None:
        if not fits_behind(decoder, vllm_config.model_config):
            raise ConfigError(
                f"drafter.exit_head does not work with {type(target).__name__}, whose layers hand on their states in "
                "another way: leave it out."
            )
        device = next(top.parameters()).device
        trained, restore = load_exit_head(exit_head, weights, tap.light, vllm_config.model_config.dtype, device)
        decoder.layers.append(trained)
        tap.restore_too(restore)
    decoder.start_layer, decoder.end_layer = 0, len(decoder.layers)
    model = shallow_copy(top)
    model._modules["model"] = without_compiler(decoder)
    if model.model is not decoder:
        raise ConfigError(
            f"method selfspec cannot make a view of {type(target).__name__}, whose model is not its own: remove the "
            "speculative config for this model."
        )
    with set_current_vllm_config(vllm_config), set_model_tag("selfspec_drafter"):
        backbone = DraftBackbone(vllm_config=vllm_config, model=model)
    head = shallow_copy(top)
    if logits_layer is not None:
        used.append(logits_layer)
        quantized = shallow_copy(logits_layer)
        quantized.quant_method = DrafterLinearMethod(tap.state(logits_layer, lm_head))
        head = with_submodule(top, lm_head_path(top), quantized)
        if getattr(getattr(top, "logits_processor", None), "head_dtype", None) is not None:
            # Only the target's head can compute in another dtype (`head_dtype` in the model's config).
            head.logits_processor = shallow_copy(top.logits_processor)
            head.logits_processor.head_dtype = None
    tap.use_only(used)
    two_views = "int4+int8" in (weights, lm_head)
    drafter = DraftModel(backbone, head, draft_layers, tap.light if two_views else None)
    return drafter, {attention.layer_name for attention in shared}
