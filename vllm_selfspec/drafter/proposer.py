"""Drafting on model runner V1: the target's view, the target's KV cache, one token per request to start from.

vLLM's runner hands `propose()` the batch that it just verified. Keys and values of every accepted token are already in
the cache, so drafting needs no prefill: draft step t runs each request's last token at position p + t, writes its key
and value into the slot that the scheduler has allocated there, and samples the next draft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from vllm_selfspec.compat.cpu_sampling import RejectionScratch
from vllm_selfspec.config import ConfigError
from vllm_selfspec.drafter import huge_pages
from vllm_selfspec.drafter.quantize import choose_precision
from vllm_selfspec.drafter.refresh import WeightTap
from vllm_selfspec.drafter.sampling import Scratch, sample_drafts
from vllm_selfspec.drafter.view import build_view, quantization_plan
from vllm_selfspec.plugin import FIRST_WHOLE_VLLM
from vllm_selfspec.speculative_config import SelfSpecSpeculativeConfig, draft_together

logger = init_logger("vllm.selfspec")


def runner_init(original: Callable[..., None], self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
    """`GPUModelRunner.__init__`, building a `SelfDraftProposer` as the drafter when the config asks for one."""
    if not isinstance(vllm_config.speculative_config, SelfSpecSpeculativeConfig):
        original(self, vllm_config, *args, **kwargs)
        return
    with patch("vllm.v1.worker.gpu_model_runner.DraftModelProposer", SelfDraftProposer):
        original(self, vllm_config, *args, **kwargs)
    # Both are read by compat/cpu_sampling.py.
    self.sampler.topk_topp_sampler.selfspec_scratch = Scratch()
    self.rejection_sampler.selfspec_scratch = RejectionScratch()


def propose_draft_token_ids(original: Callable[..., Any], self: Any, scheduler_output: Any, *args: Any) -> Any:
    """`GPUModelRunner.propose_draft_token_ids`, with the view that the scheduler has chosen."""
    if isinstance(self.drafter, SelfDraftProposer):
        self.drafter.model.light = getattr(scheduler_output, "selfspec_light", None)
    return original(self, scheduler_output, *args)


def check_and_update_cudagraph_mode(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """`GPUModelRunner._check_and_update_cudagraph_mode`, after which the drafter knows its graphs, too."""
    original(self, *args, **kwargs)
    if isinstance(getattr(self, "drafter", None), SelfDraftProposer):
        self.drafter.initialize_cudagraph_keys(self.cudagraph_dispatcher.cudagraph_mode)


def selfspec_light_view(self: Any) -> bool:
    """Worker method, for `collective_rpc("selfspec_light_view")`: the drafter has a light view to choose."""
    drafter = getattr(self.model_runner, "drafter", None)
    return isinstance(drafter, SelfDraftProposer) and drafter.model.has_light_view


def selfspec_use_huge_pages(self: Any) -> None:
    """Worker method, called when the engine has all its memory: its weights move to huge pages where that helps."""
    drafter = getattr(self.model_runner, "drafter", None)
    if isinstance(drafter, SelfDraftProposer):
        drafter.use_huge_pages()


def verified_draft_probs(
    original: Callable[..., torch.Tensor | None], self: Any, spec_decode_metadata: Any
) -> torch.Tensor | None:
    """`GPUModelRunner._get_spec_decode_draft_probs`, without a copy where the batch is the one that drafted.

    Returns:
        [N, V] what the drafts that are verified were drawn from, valid until the drafter's next proposal.
    """
    probs = self._draft_probs
    if probs is not None and self.input_batch.req_ids == self._draft_prob_req_ids:
        batch_size, gamma, _ = probs.shape
        if spec_decode_metadata.num_draft_tokens == [gamma] * batch_size:
            flat: torch.Tensor = probs.flatten(0, 1)
            return flat
    return original(self, spec_decode_metadata)


def draft_slots(
    start: torch.Tensor,
    limit: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    num_draft_tokens: int,
) -> torch.Tensor:
    """KV-cache slots that each draft step may write.

    Args:
        start: [B] position of each request's last token, which draft step 0 runs.
        limit: [B] positions below this one are allocated to the request; 0 for a request that must not draft.
        block_table: [B, W] block ids; entries past the allocated ones are stale ids of other requests.
        block_size: tokens per block.
        num_draft_tokens: γ.

    Returns:
        [γ, B] int64 slots, `PADDING_SLOT_ID` wherever the position is not allocated to the request.
    """
    positions = start + torch.arange(num_draft_tokens, device=start.device).unsqueeze(1)  # [γ, B]
    blocks = (positions // block_size).clamp_(max=block_table.shape[1] - 1)
    block_ids = block_table.gather(1, blocks.t()).t()
    slots = block_ids.long() * block_size + positions % block_size
    return slots.masked_fill_(positions >= limit, PADDING_SLOT_ID)


class SelfDraftProposer(DraftModelProposer):
    """The proposer of `method: selfspec`: drafts with a view of the target model."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        assert isinstance(self.speculative_config, SelfSpecSpeculativeConfig)
        if draft_together(vllm_config.model_config, vllm_config.parallel_config):
            raise ConfigError(
                "data_parallel_size > 1 with a mixture of experts needs drafts on all ranks at once, and model runner "
                "V1 does not make them: start one engine per rank, or on a GPU set VLLM_USE_V2_MODEL_RUNNER=1, which "
                f"takes vLLM {FIRST_WHOLE_VLLM} or newer."
            )
        self._runner = runner
        self.supports_mm_inputs = False
        self._adds_offsets: bool = vllm_config.model_config.uses_mrope
        if self._adds_offsets:  # text behind a prompt has the same position on all axes: one is kept
            self.uses_mrope = False
            self.positions = torch.zeros(self.max_positions, dtype=torch.int64, device=device)
            images = vllm_config.model_config.multimodal_config
            prunes = images is not None and images.is_multimodal_pruning_enabled()
            if prunes and vllm_config.scheduler_config.async_scheduling:
                # vLLM's runner would take the target's own positions anew, as if no draft had been rejected.
                raise ConfigError(
                    "video_pruning_rate needs async_scheduling to be off with method selfspec on model runner V1: "
                    "set it to false, or remove what keeps model runner V2 away."
                )
        drafter = self.speculative_config.selfspec.drafter
        self._exit_head = drafter.exit_head
        self._layers = drafter.layers(vllm_config.model_config.get_total_num_hidden_layers())
        self._weights = choose_precision("drafter.weights", drafter.weights, self.device.type)
        self._lm_head = choose_precision("drafter.lm_head", drafter.lm_head, self.device.type)
        plan = quantization_plan(vllm_config, self._layers, self._weights, self._lm_head, drafter.experts)
        self._tap = WeightTap(vllm_config, plan)
        self._scratch = Scratch()
        self._steps = torch.arange(self.max_batch_size + 1, dtype=torch.int32)

    def _raise_if_mrope(self) -> None:
        """M-RoPE is no hindrance: see `_rotary_offsets`."""

    def _warn_if_multimodal(self) -> None:
        """Nor are images: what the drafter would see of them is in the KV cache."""

    def load_model(self, target_model: nn.Module) -> None:
        """Build the view of the loaded target."""
        self.model, self._draft_attn_layer_names = build_view(
            target_model,
            self.vllm_config,
            self._layers,
            self._weights,
            self._lm_head,
            self._tap,
            self._exit_head,
            begins_batches=True,
        )
        self._tap.watch(target_model)
        logger.info(
            "selfspec drafts with %d of %d layers, weights %s, LM head %s: %.1f MiB of weights of its own, no KV cache "
            "of its own.",
            len(self._layers),
            self.vllm_config.model_config.get_total_num_hidden_layers(),
            self._weights,
            self._lm_head,
            self._tap.nbytes / 2**20,
        )

    def use_huge_pages(self) -> None:
        """Move the weights on a CPU to huge pages, now and after every update of them.

        Called once the engine has all its memory: the small pages that are freed lie scattered, which makes them slow,
        so the KV cache should not be the next to get them.
        """
        if self.device.type != "cpu":
            return
        # What vLLM has packed is not among the parameters, but embeddings are.
        weights = self._tap.nbytes + sum(weight.nbytes for weight in self._runner.model.parameters())
        if weights >= huge_pages.WORTH_IT:
            self._move_to_huge_pages()
            self._tap.restore_too(self._move_to_huge_pages)  # what vLLM packs anew lies elsewhere

    def _move_to_huge_pages(self) -> None:
        # The KV cache may be much larger than the weights.
        huge_pages.move_to_huge_pages(leave=self._runner.kv_caches)

    def validate_same_kv_cache_group(self, kv_cache_config: KVCacheConfig) -> None:
        groups = len(kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise ConfigError(
                f"method selfspec needs all layers in one KV-cache group, but this model has {groups} (mixed attention "
                "kinds): remove the speculative config, or start with --disable-hybrid-kv-cache-manager."
            )

    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Make the attention groups of the drafter's layers."""
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, list(self._draft_attn_layer_names))
        shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for layer in layers.values()}
        if self.device.type == "cpu" and len(shapes) > 1:
            raise ConfigError(
                f"method selfspec drafts on CPU with layers of one shape, but this model's have {len(shapes)} (heads, "
                "KV heads, head size): remove the speculative config."
            )
        block_size = kernel_block_sizes[self.kv_cache_gid] if kernel_block_sizes else None
        for group in self.draft_attn_groups:
            # Once more, now that the group has all its layers: how they are attended to depends on whether they agree.
            group.create_metadata_builders(self.vllm_config, self.device, kernel_block_size=block_size)

    def initialize_cudagraph_keys(self, cudagraph_mode: CUDAGraphMode) -> None:
        # Whether a graph applies adapters is settled when it is captured, and the drafter's graphs are not told apart
        # by that, as the target's are.
        super().initialize_cudagraph_keys(CUDAGraphMode.NONE if self._runner.lora_config else cudagraph_mode)

    @torch.inference_mode()
    def dummy_run(
        self, num_tokens: int, use_cudagraphs: bool = True, is_graph_capturing: bool = False, **kwargs: Any
    ) -> None:
        """Run the drafter once, on no more rows than it will ever see: one per request."""
        self.num_speculative_tokens = 1
        rows = min(num_tokens, self.max_batch_size)
        if not is_graph_capturing:  # what is compiled for one row may be for one row only
            rows = max(2, rows)
        if self._runner.lora_config:
            # The target's mapping is of more rows, which the adapters' kernels would read.
            self._runner._set_active_loras((0,) * rows, (0,) * rows, set())
        super().dummy_run(rows, use_cudagraphs, is_graph_capturing, **kwargs)
        self.num_speculative_tokens = self.speculative_config.num_speculative_tokens

    def _allocated_tokens(self, batch_size: int) -> torch.Tensor:
        """[B] number of tokens for which each request has KV blocks; 0 for requests that did not sample."""
        table = self._runner.input_batch.block_table[self.kv_cache_gid]
        tokens = torch.from_numpy(table.num_blocks_per_row[:batch_size]) * table.block_size
        tokens.clamp_(max=self.max_model_len)
        tokens = tokens.to(self.device, non_blocking=True)
        return tokens.masked_fill(self._runner.discard_request_mask.gpu[:batch_size], 0)

    def _rotary_offsets(self, batch_size: int) -> torch.Tensor:
        """[B] what M-RoPE adds to the places of each request's text: an image takes fewer positions than tokens."""
        names = self._runner.input_batch.req_ids[:batch_size]
        offsets = [self._runner.requests[name].mrope_position_delta for name in names]
        return torch.tensor(offsets).to(self.device, non_blocking=True)

    def _returned_experts(self, num_rows: int) -> torch.Tensor | None:
        """[num_rows, layers, experts per token] that the target's routers chose in this step, where vLLM returns them.

        They lie there until the step is over, and drafts run through the same routers. (On this runner before vLLM 0.32
        alone.)
        """
        if not getattr(self._runner, "routed_experts_initialized", False):
            return None
        buffer: torch.Tensor = self._runner.routed_experts_capturer.get_device_buffer()
        return buffer[:num_rows]

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor:
        """Draft γ = `num_speculative_tokens` tokens for each of the B requests.

        Args:
            next_token_ids: [B] the token that each request sampled last.
            common_attn_metadata: the batch just verified; `seq_lens` counts rejected tokens too.
            num_rejected_tokens_gpu: [B] drafts rejected in this step, None where none were verified.

        Returns:
            [B, γ] int64 draft token ids.
        """
        self._last_draft_probs = None  # and with it what the runner holds: both are of the step before
        batch_size = common_attn_metadata.batch_size()
        gamma = num_speculative_tokens
        drafts = torch.empty((batch_size, gamma), dtype=torch.int64, device=self.device)
        if gamma == 0:
            return drafts
        self._tap.refresh()
        if self._runner.lora_config:
            # One row per request from here on; the runner sets the mapping anew for the target's next step.
            self._runner.set_active_loras(self._runner.input_batch, np.ones(batch_size, dtype=np.int32))

        start = common_attn_metadata.seq_lens[:batch_size]
        if num_rejected_tokens_gpu is not None:
            start = start - num_rejected_tokens_gpu
        limit = self._allocated_tokens(batch_size)
        start = torch.where(limit > 0, start, 0).long()
        table = common_attn_metadata.block_table_tensor[:batch_size]
        block_size = self._runner.input_batch.block_table[self.kv_cache_gid].block_size
        slots = draft_slots(start, limit, table, block_size, gamma)
        positions = start + torch.arange(gamma, device=self.device).unsqueeze(1)  # [γ, B]
        positions.clamp_(max=self.max_model_len - 1)
        lengths = torch.minimum(positions + 1, limit.clamp(min=1))
        if self._adds_offsets:
            positions = (positions + self._rotary_offsets(batch_size)).clamp_(min=0)

        metadata = CommonAttentionMetadata(
            query_start_loc=self.arange[: batch_size + 1],
            query_start_loc_cpu=self._steps[: batch_size + 1],
            seq_lens=torch.empty_like(common_attn_metadata.seq_lens[:batch_size]),
            num_reqs=batch_size,
            num_actual_tokens=batch_size,
            max_query_len=1,
            max_seq_len=min(common_attn_metadata.max_seq_len + gamma, self.max_model_len),
            block_table_tensor=table,
            slot_mapping=self._slot_mapping_buffer[:batch_size],
            seq_lens_cpu_upper_bound=None,
        )
        upper_bound = common_attn_metadata.seq_lens_cpu_upper_bound
        execution = self._determine_batch_execution_and_padding(batch_size)
        num_rows = execution[1]
        # Rows that do not sample leave their generators alone: how a prompt is chunked must not change a seeded text.
        idle = self._runner.discard_request_mask.np
        generators = {row: generator for row, generator in sampling_metadata.generators.items() if not idle[row]}
        returned = self._returned_experts(num_rows)
        of_the_target = None if returned is None else returned.clone()
        tokens = next_token_ids
        probs: torch.Tensor | None = None
        with ExitStack() as context:
            for step in range(gamma):
                self.input_ids[:batch_size] = tokens
                self.positions[:batch_size] = positions[step]
                metadata.seq_lens.copy_(lengths[step])
                if upper_bound is not None:
                    upper = upper_bound[:batch_size] + step + 1
                    metadata.seq_lens_cpu_upper_bound = upper.clamp_(max=self.max_model_len)
                slot_mapping = self._get_slot_mapping(num_rows, slots[step])
                if step == 0 or self.model.draft_layers is None:
                    context.close()
                    context.enter_context(self._forward_context(metadata, step, slot_mapping, execution))
                hidden = self.model(self.input_ids[:num_rows], self.positions[:num_rows])[:batch_size]
                logits = self.model.compute_logits(hidden)
                if probs is None and not sampling_metadata.all_greedy:
                    probs = self._scratch.take((batch_size, gamma, logits.shape[1]), torch.float32, logits.device)
                q = None if probs is None else probs[:, step]
                tokens = drafts[:, step] = sample_drafts(logits, sampling_metadata, generators, q)
        if returned is not None:
            returned.copy_(of_the_target)
        self._last_draft_probs = probs
        return drafts

    @contextmanager
    def _forward_context(
        self,
        metadata: CommonAttentionMetadata,
        step: int,
        slot_mapping: dict[str, torch.Tensor],
        execution: tuple[CUDAGraphMode, int, torch.Tensor | None],
    ) -> Iterator[None]:
        """What the view's forward of draft `step` finds around it; for `DraftLayers` those of later drafts, too.

        Args:
            execution: as of `_determine_batch_execution_and_padding`.
        """
        cudagraph_mode, num_rows, num_tokens_across_dp = execution
        per_group, per_layer = self.build_per_group_and_layer_attn_metadata(metadata, draft_index=step)
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=num_rows,
            num_tokens_across_dp=num_tokens_across_dp,
            cudagraph_runtime_mode=cudagraph_mode,
            slot_mapping=slot_mapping,
        ):
            if self.model.draft_layers is None:
                yield
                return
            builder = self.draft_attn_groups[0].get_metadata_builder()
            with self.model.draft_layers.batch(per_group[0], builder, next(iter(slot_mapping.values()))):
                yield
