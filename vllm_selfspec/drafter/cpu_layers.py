"""Layers of the drafter on CPU with little work around their products, by `csrc/cpu_layers.cpp`.

A draft is a forward of one row per request. vLLM's two Python operators per attention layer were a tenth of one, and
what a compiled graph does between its products another quarter or more. So a decoder layer of a well-known kind is one
operator, and where a layer is of another kind its attention is.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm import envs
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_selfspec.drafter.cpu_kernels import own_kernels
from vllm_selfspec.drafter.quantize_rows import OperatorLinear

_KINDS = {
    ("llama.LlamaDecoderLayer", "llama.LlamaAttention", "llama.LlamaMLP"),
    ("mistral.MistralDecoderLayer", "mistral.MistralAttention", "llama.LlamaMLP"),
    ("qwen2.Qwen2DecoderLayer", "qwen2.Qwen2Attention", "qwen2.Qwen2MLP"),
    ("qwen3.Qwen3DecoderLayer", "qwen3.Qwen3Attention", "qwen2.Qwen2MLP"),
    ("qwen3_vl.Qwen3VLDecoderLayer", "qwen3.Qwen3Attention", "qwen2.Qwen2MLP"),
}
"""Layers of vLLM's models, their attention and their MLP, that compute what `draft_layers` does."""

_LANES = 8
"""The operator works on so many values at a time."""


class DraftAttention(Attention):
    """A copy of an attention layer of the target, run by the operator.

    Attributes:
        place: its number among the drafter's layers. Compiled graphs hold it.
    """

    place: int

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """[T, H * D], of queries [T, H * D] and keys and values [T, KH * D], or the same with D as a last dimension."""
        queries, keys = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        return torch.ops.selfspec_cpu.draft_attention(
            query.view(-1, queries), key.view(-1, keys), value.view(-1, keys), self.place
        )


class DraftStack(nn.Module):
    """Decoder layers of a view, one after the other, run by the operator."""

    def __init__(self, layers: list[Any]) -> None:
        """From layers of the view whose attention layers' places follow each other."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.place = layers[0].self_attn.attn.place

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and residual [T, hidden_size], at positions [T]."""
        return torch.ops.selfspec_cpu.draft_layers(hidden_states, residual, positions, self.place, len(self.layers))


class Parts(NamedTuple):
    """What surrounds the attention of a layer.

    Attributes:
        norms: the one before the attention, that before the MLP, and, if any, those of queries and of keys.
        rotary: the rotary embedding.
        linears: projections to queries, keys and values, from the attention's output, up to the gates and the MLP's
            other values, and down from them.
    """

    norms: list[RMSNorm]
    rotary: RotaryEmbedding | MRotaryEmbedding
    linears: list[Any]

    @classmethod
    def of(cls, layer: Any) -> Parts:
        """The parts of a layer of one of the known kinds."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if hasattr(attention, "q_norm"):
            norms += [attention.q_norm, attention.k_norm]
        linears = [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]
        return cls(norms, attention.rotary_emb, linears)

    def tensors(self) -> list[torch.Tensor | None]:
        """Those that vLLM keeps, which an update might replace; the drafter's own weights are written in place."""
        norms, biases = ([part.weight for part in self.norms], [part.bias for part in self.linears])
        return [*norms, self.rotary.cos_sin_cache, *biases]


def is_one_operator(layer: Any) -> bool:
    """True where `draft_layers` computes what a layer of a view computes."""
    if tuple(map(_kind, (layer, getattr(layer, "self_attn", None), getattr(layer, "mlp", None)))) not in _KINDS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms, rotary, linears = Parts.of(layer)
    rotation = getattr(type(rotary), "forward_native", None)  # LongRoPE has none
    if rotation not in (RotaryEmbedding.forward_native, MRotaryEmbedding.forward_native):  # alike for one position
        return False
    widths = (layer.hidden_size, attention.head_dim, rotary.rotary_dim // 2, mlp.down_proj.input_size)
    return (
        isinstance(attention.attn, DraftAttention)
        and all(type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None for norm in norms)
        and rotary.is_neox_style
        and type(mlp.act_fn) is SiluAndMul
        and all(isinstance(getattr(linear.quant_method, "state", None), OperatorLinear) for linear in linears)
        and all(linear.tp_size == 1 and not linear.skip_bias_add for linear in linears)
        and all(width % _LANES == 0 for width in widths)
        and getattr(layer, "ada_rms_norm_t_cond", None) is None
        and not getattr(attention, "do_llama_4_scaling", False)
    )


def _kind(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}".removeprefix("vllm.model_executor.models.")


def usable_for(layers: Iterable[nn.Module]) -> bool:
    """True where the operators do all that these attention layers do."""
    return bool(own_kernels()) and all(
        type(layer) is Attention
        and type(layer.impl) is CPUAttentionBackendImpl
        and layer.impl.attn_type == AttentionType.DECODER
        and layer.impl.alibi_slopes is None
        and layer.impl.sinks is None
        and not layer.impl.is_fp8_kv_cache
        and layer.kv_sharing_target_layer_name is None
        and layer.head_size == layer.head_size_v
        for layer in layers
    )


class DraftLayers:
    """The layers of one drafter, whose attention uses the KV cache of the target's layers that they are copies of."""

    def __init__(self) -> None:
        self._copies: dict[Attention, DraftAttention] = {}
        self._parts: dict[int, Parts] = {}
        self._seen: list[torch.Tensor | None] = []
        self._operator: torch.ScriptObject | None = None

    def attention(self, attention: Attention) -> DraftAttention:
        """What stands for an attention layer of the target in a view."""
        if attention not in self._copies:
            draft = copy.copy(attention)
            draft.__class__ = DraftAttention
            draft.place = len(self._copies)
            self._copies[attention] = draft
        return self._copies[attention]

    def stack(self, layers: Iterable[Any]) -> list[nn.Module]:
        """What stands for the decoder layers of a view: those that the operator can run are put together."""
        result: list[nn.Module] = []
        run: list[Any] = []
        for layer in layers:
            fits = is_one_operator(layer)
            if run and not (fits and layer.self_attn.attn.place == run[-1].self_attn.attn.place + 1):
                result.append(DraftStack(run))
                run = []
            if fits:
                run.append(layer)
                self._parts[layer.self_attn.attn.place] = Parts.of(layer)
            else:
                result.append(layer)
        return [*result, DraftStack(run)] if run else result

    @contextmanager
    def batch(
        self, metadata: CPUAttentionMetadata, builder: CPUAttentionMetadataBuilder, slot_mapping: torch.Tensor
    ) -> Iterator[None]:
        """Forwards over a batch whose lengths and slots may change between them.

        Args:
            metadata: of the batch, one token per request. The lengths are read from its `seq_lens` in each forward.
            builder: made the metadata.
            slot_mapping: [T] slots for keys and values, read in each forward.
        """
        seen = [attention.kv_cache for attention in self._copies]
        for parts in self._parts.values():
            seen += parts.tensors()
        if self._operator is None or any(map(operator.is_not, seen, self._seen)):
            self._operator, self._seen = self._describe(builder), seen
        self._operator.begin(
            metadata.num_actual_tokens, slot_mapping, metadata.query_start_loc, metadata.seq_lens, metadata.block_table
        )
        try:
            yield
        finally:
            self._operator.end()

    def _describe(self, builder: CPUAttentionMetadataBuilder) -> torch.ScriptObject:
        layers = torch.classes.selfspec_cpu.DraftLayers(
            builder.num_heads, builder.window_size, envs.VLLM_CPU_ATTN_SPLIT_KV
        )
        for place, attention in enumerate(self._copies):
            impl = attention.impl
            blocks, heads, block_size, _ = attention.kv_cache.shape  # each block holds keys, then values
            keys, values = attention.kv_cache.view(blocks, heads, 2 * block_size, -1).chunk(2, dim=2)
            layers.add(
                keys,
                values,
                attention.num_heads,
                attention.head_size,
                impl.scale,
                impl.sliding_window,
                float(impl.logits_soft_cap),
                attention.isa,
            )
            if place in self._parts:
                norms, rotary, linears = self._parts[place]
                layers.surround(
                    [norm.weight for norm in norms],
                    [norm.variance_epsilon for norm in norms],
                    rotary.cos_sin_cache.to(norms[0].weight.dtype),
                    *map(_described, linears),
                )
        return layers


def _described(linear: Any) -> torch.ScriptObject:
    state: OperatorLinear = linear.quant_method.state
    return torch.classes.selfspec_cpu.Linear(state.operator, list(state.tensors), state.outputs, linear.bias)
