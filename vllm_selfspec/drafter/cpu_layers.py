"""Layers of the drafter on CPU with little work around their products, by `csrc/cpu_layers.cpp`.

A draft is a forward of one row per request. vLLM's two Python operators per attention layer were a tenth of one, and
what a compiled graph does between its products another fifth. So a decoder layer of a well-known kind is one operator,
and where a layer is of another kind its attention is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm import envs
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
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
    ("mistral.MistralDecoderLayer", "mistral.MistralAttention", "mistral.MistralMLP"),
    ("qwen2.Qwen2DecoderLayer", "qwen2.Qwen2Attention", "qwen2.Qwen2MLP"),
    ("qwen3.Qwen3DecoderLayer", "qwen3.Qwen3Attention", "qwen2.Qwen2MLP"),
}
"""Layers of vLLM's models, their attention and their MLP, that compute what `draft_layer` does."""

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


class DraftLayer(nn.Module):
    """A decoder layer of a view as one operator."""

    def __init__(self, layer: Any) -> None:
        """From a layer of the view, which `is_one_operator`."""
        super().__init__()
        self.layer = layer
        self.place = layer.self_attn.attn.place

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and residual [T, hidden_size], at positions [T]."""
        return torch.ops.selfspec_cpu.draft_layer(hidden_states, residual, positions, self.place)

    def parts(self) -> Parts:
        """The tensors and weights that the layer has now."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        norms = [self.layer.input_layernorm, self.layer.post_attention_layernorm]
        if hasattr(attention, "q_norm"):
            norms += [attention.q_norm, attention.k_norm]
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        return Parts(
            [norm.weight for norm in norms],
            [norm.variance_epsilon for norm in norms],
            attention.rotary_emb.cos_sin_cache,
            [linear.quant_method.state for linear in linears],
            [linear.bias for linear in linears],
        )


class Parts(NamedTuple):
    """What surrounds the attention of a layer.

    Attributes:
        norms: weights of the norm before the attention, that before the MLP, and, if any, those of queries and of keys.
        epsilons: of the norms.
        cos_sin: [positions, rotary dim].
        linears, biases: of the projections to queries, keys and values, from the attention's output, up to the gates
            and the MLP's other values, and down from them.
    """

    norms: list[torch.Tensor]
    epsilons: list[float]
    cos_sin: torch.Tensor
    linears: list[OperatorLinear]
    biases: list[torch.Tensor | None]

    def same_as(self, other: Parts) -> bool:
        """True where all tensors are the very same ones."""
        mine, others = (*self.norms, self.cos_sin, *self.biases), (*other.norms, other.cos_sin, *other.biases)
        return all(map(lambda a, b: a is b, mine, others))


def is_one_operator(layer: nn.Module) -> bool:
    """True where `draft_layer` computes what a layer of a view computes."""
    kinds = tuple(map(_kind, (layer, getattr(layer, "self_attn", None), getattr(layer, "mlp", None))))
    if kinds not in _KINDS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    rotary = attention.rotary_emb
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    widths = (layer.hidden_size, attention.head_dim, rotary.rotary_dim // 2, mlp.down_proj.input_size)
    return (
        isinstance(attention.attn, DraftAttention)
        and all(type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None for norm in norms)
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.is_neox_style
        and type(mlp.act_fn) is SiluAndMul
        and all(isinstance(getattr(linear.quant_method, "state", None), OperatorLinear) for linear in linears)
        and all(linear.tp_size == 1 and not linear.skip_bias_add for linear in linears)
        and all(width % _LANES == 0 for width in widths)
        and getattr(layer, "ada_rms_norm_t_cond", None) is None
        and not getattr(attention, "do_llama_4_scaling", False)
    )


def _kind(module: nn.Module | None) -> str:
    return f"{type(module).__module__.rpartition('.')[2]}.{type(module).__qualname__}"


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
        self._whole: dict[int, DraftLayer] = {}
        self._caches: list[torch.Tensor] = []
        self._parts: list[Parts] = []
        self._operator: torch.ScriptObject | None = None

    def attention(self, attention: Attention) -> DraftAttention:
        """What stands for an attention layer of the target in a view."""
        if attention not in self._copies:
            draft = copy.copy(attention)
            draft.__class__ = DraftAttention
            draft.place = len(self._copies)
            self._copies[attention] = draft
        return self._copies[attention]

    def layer(self, layer: nn.Module) -> nn.Module:
        """What stands for a decoder layer of a view: one operator where that does the same, else the layer itself."""
        if not is_one_operator(layer):
            return layer
        whole = DraftLayer(layer)
        self._whole[whole.place] = whole
        return whole

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
        caches = [attention.kv_cache for attention in self._copies]
        parts = [whole.parts() for whole in self._whole.values()]
        if (
            self._operator is None
            or any(new is not old for new, old in zip(caches, self._caches, strict=True))
            or not all(map(Parts.same_as, parts, self._parts))
        ):
            self._operator, self._caches, self._parts = self._describe(builder), caches, parts
        self._operator.begin(
            metadata.num_actual_tokens, slot_mapping, metadata.query_start_loc, metadata.seq_lens, metadata.block_table
        )
        try:
            yield
        finally:
            self._operator.end()

    def _describe(self, builder: CPUAttentionMetadataBuilder) -> torch.ScriptObject:
        operator = torch.classes.selfspec_cpu.DraftLayers(
            builder.num_heads, builder.window_size, envs.VLLM_CPU_ATTN_SPLIT_KV
        )
        for place, attention in enumerate(self._copies):
            impl = attention.impl
            blocks, heads, block_size, _ = attention.kv_cache.shape  # each block holds keys, then values
            keys, values = attention.kv_cache.view(blocks, heads, 2 * block_size, -1).chunk(2, dim=2)
            operator.add(
                keys,
                values,
                attention.num_heads,
                attention.head_size,
                impl.scale,
                impl.sliding_window,
                float(impl.logits_soft_cap),
                attention.isa,
            )
            if place in self._whole:
                norms, epsilons, cos_sin, linears, biases = self._whole[place].parts()
                described = [
                    torch.classes.selfspec_cpu.Linear(linear.operator, list(linear.tensors), linear.outputs, bias)
                    for linear, bias in zip(linears, biases, strict=True)
                ]
                operator.surround(norms, epsilons, cos_sin.to(norms[0].dtype), *described)
        return operator
