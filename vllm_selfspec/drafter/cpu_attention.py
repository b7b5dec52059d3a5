"""Attention of the drafter on CPU with little work around it, by `csrc/cpu_attention.cpp`.

A draft is a forward of one row per request, of which vLLM's two Python operators per attention layer were a tenth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from vllm import envs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_selfspec.drafter.cpu_kernels import own_kernels


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


def usable_for(layers: Iterable[nn.Module]) -> bool:
    """True where the operator does all that these attention layers do."""
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


class DraftAttentions:
    """The attention layers of one drafter, which use the KV cache of the target's layers that they are copies of."""

    def __init__(self) -> None:
        self._copies: dict[Attention, DraftAttention] = {}
        self._caches: list[torch.Tensor] = []
        self._operator: torch.ScriptObject | None = None

    def copy_of(self, attention: Attention) -> DraftAttention:
        """What stands for a layer of the target in a view."""
        if attention not in self._copies:
            draft = copy.copy(attention)
            draft.__class__ = DraftAttention
            draft.place = len(self._copies)
            self._copies[attention] = draft
        return self._copies[attention]

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
        if self._operator is None or any(new is not old for new, old in zip(caches, self._caches, strict=True)):
            self._operator, self._caches = self._describe(builder), caches
        self._operator.begin(
            metadata.num_actual_tokens, slot_mapping, metadata.query_start_loc, metadata.seq_lens, metadata.block_table
        )
        try:
            yield
        finally:
            self._operator.end()

    def _describe(self, builder: CPUAttentionMetadataBuilder) -> torch.ScriptObject:
        operator = torch.classes.selfspec_cpu.DraftAttention(
            builder.num_heads, builder.window_size, envs.VLLM_CPU_ATTN_SPLIT_KV
        )
        for attention in self._copies:
            impl = attention.impl
            blocks, heads, block_size, _ = attention.kv_cache.shape  # each block holds keys, then values
            keys, values = attention.kv_cache.view(blocks, heads, 2 * block_size, -1).chunk(2, dim=2)
            operator.add(
                keys,
                values,
                attention.head_size,
                impl.scale,
                impl.sliding_window,
                float(impl.logits_soft_cap),
                attention.isa,
            )
        return operator
