"""Drafting on model runner V2: the same view and the same rules as `proposer.py`, on V2's persistent device buffers.

One CUDA graph holds one whole draft step: positions, KV slots, attention metadata, forward pass, sampling and the
hand-over of the token to the next step. The step's number is a tensor on the device, so γ drafts are γ replays of the
same graph, for every γ, with no work and no synchronisation on the host in between. Attention backends that cannot
refresh their metadata on the device, and batches beyond the captured sizes, run the same step without a graph.

Not run on a GPU yet. In the engine tests it runs on CPU under vLLM's own V2 runner, with Triton's interpreter, with and
without (recorded) graphs. On CUDA it is what an engine without adapters gets, see `runner.py`; the graphs in which the
target verifies are in `verify_graphs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.utils import AttentionGroup

from vllm_selfspec.config import ConfigError
from vllm_selfspec.drafter.proposer import draft_slots
from vllm_selfspec.drafter.quantize import choose_precision
from vllm_selfspec.drafter.refresh import WeightTap
from vllm_selfspec.drafter.view import build_view, quantization_plan
from vllm_selfspec.plugin import older_than
from vllm_selfspec.speculative_config import SelfSpecSpeculativeConfig

if older_than("0.32"):
    from vllm.v1.worker.gpu.spec_decode.autoregressive.cudagraph_utils import SpeculatorCudaGraphManager
else:
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

logger = init_logger("vllm.selfspec")


def init_speculator(original: Callable[..., Any], vllm_config: VllmConfig, device: torch.device, *args: Any) -> Any:
    """V2's `init_speculator`, building a `SelfDraftSpeculator` when the config asks for one."""
    if not isinstance(vllm_config.speculative_config, SelfSpecSpeculativeConfig):
        return original(vllm_config, device, *args)
    return SelfDraftSpeculator(vllm_config, device)


def execute_model(original: Callable[..., Any], self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    """V2's `GPUModelRunner.execute_model` before vLLM 0.32, which does not tell the drafter its draft length."""
    if isinstance(self.speculator, SelfDraftSpeculator) and hasattr(scheduler_output, "selfspec_light"):
        self.speculator.scheduled_drafts = scheduler_output.num_spec_tokens_to_schedule
    return original(self, scheduler_output, *args, **kwargs)


def gather_block_tables(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """V2's `BlockTables.gather_block_tables`, which also copies how many blocks each request owns.

    vLLM has these numbers in host memory that it writes again two steps on, once this step's tokens are known: the
    drafts that follow these would read them too late.
    """
    if hasattr(self, "selfspec_num_blocks"):
        self.selfspec_num_blocks.copy_(self.num_blocks.gpu[0])
    return original(self, *args, **kwargs)


class SelfDraftSpeculator(DraftModelSpeculator):
    """The speculator of `method: selfspec`: drafts with a view of the target model, on the target's KV cache.

    The input buffers are as in vLLM's own speculators; rows are requests, in the order of the batch. Rows past the
    batch, and those of a dummy run, have `idx_mapping` -1 and `_limit` 0: they write no KV.
    """

    draft_attn_layer_names: set[str]

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        assert isinstance(self.speculative_config, SelfSpecSpeculativeConfig)
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise ConfigError(
                "decode_context_parallel_size and prefill_context_parallel_size must be 1 with method selfspec: "
                "use tensor parallelism instead."
            )
        if vllm_config.lora_config is not None:
            raise ConfigError(
                "enable_lora does not work with method selfspec on model runner V2, whose draft steps have no adapter "
                "mapping: set VLLM_USE_V2_MODEL_RUNNER=0."
            )
        drafter = self.speculative_config.selfspec.drafter
        self._exit_head = drafter.exit_head
        self._layers = drafter.layers(vllm_config.model_config.get_total_num_hidden_layers())
        self._weights = choose_precision("drafter.weights", drafter.weights, self.device.type)
        self._lm_head = choose_precision("drafter.lm_head", drafter.lm_head, self.device.type)
        plan = quantization_plan(vllm_config, self._layers, self._weights, self._lm_head, drafter.experts)
        self._tap = WeightTap(vllm_config, plan)
        self._view_layer_names: set[str] = set()
        self._manager: SpeculatorCudaGraphManager | None = None

        self.scheduled_drafts = self.num_speculative_steps
        """γ, where `propose` is not told it."""
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._start = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        """Position of each request's last token, which draft step 0 runs."""
        self._limit = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        """Positions below this one are allocated to the request; 0 for a row that must not write."""
        self._rotary_positions = self.input_buffers.positions
        """Of each row's token; with M-RoPE, other than its place in the KV cache."""
        self._rotary_offset: torch.Tensor | None = None
        """[max_num_reqs] what M-RoPE adds to the places of each request's text."""
        if vllm_config.model_config.uses_mrope:
            self._rotary_positions = torch.zeros_like(self.input_buffers.positions)
            self._rotary_offset = torch.zeros_like(self._start)
        self._num_blocks = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        """KV blocks that each request owns, by request-state index; `gather_block_tables` fills it."""
        self._row_numbers = torch.arange(self.max_num_reqs + 1, dtype=torch.int32, device=device)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        model, self._view_layer_names = build_view(
            target_model, self.vllm_config, self._layers, self._weights, self._lm_head, self._tap, self._exit_head
        )
        # Drafts are drawn from logits as the rejection sampler will see them.
        model.logits_dtype = None if self.draft_logits is None else self.draft_logits.dtype
        return model

    def load_model(self, target_model: nn.Module) -> None:
        """Build the view of the loaded target."""
        super().load_model(target_model)
        self.supports_mm_inputs = False
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

    def set_attn(
        self,
        model_state: ModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: InputBuffers,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        groups = len(kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise ConfigError(
                f"method selfspec needs all layers in one KV-cache group, but this model has {groups} (mixed attention "
                "kinds): remove the speculative config, or start with --disable-hybrid-kv-cache-manager."
            )
        # To the runner the attention layers are the target's alone; only the metadata builders made here, of which
        # the drafter needs its own, are for the layers of the view.
        own, self.draft_attn_layer_names = self.draft_attn_layer_names, self._view_layer_names
        super().set_attn(model_state, kv_cache_config, block_tables, target_input_buffers, target_attn_groups)
        self.draft_attn_layer_names = own
        block_tables.selfspec_num_blocks = self._num_blocks
        # Before vLLM 0.32 the tables hold the blocks of the attention kernels, into which those of the cache are split.
        self._block_size = (block_tables.kernel_block_sizes if older_than("0.32") else block_tables.block_sizes)[0]
        self._updates_metadata = all(
            group.supports_draft_decode_metadata_update for groups in self.attn_groups for group in groups
        )
        """Whether the attention backends bring their metadata to the next draft on the device."""

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL and self._updates_metadata
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self._manager = SpeculatorCudaGraphManager(self.vllm_config, self.device, mode, decode_query_len=1)

    def capture(self) -> None:
        """Capture one draft step per batch size."""
        assert self._manager is not None
        self.idx_mapping.fill_(-1)
        self._start.zero_()
        self._limit.zero_()
        self._step.zero_()
        self._manager.capture(
            self._whole_step,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing selfspec draft CUDA graphs",
        )

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        dp_sync: DPSyncState | None = None,
    ) -> torch.Tensor:
        """Draft γ = `num_speculative_tokens` tokens for each of the B requests.

        Args:
            input_batch: the batch just verified; `seq_lens` counts rejected tokens too.
            num_sampled: [B] tokens that each request got in this step, 0 where its prompt is not through yet.
            num_rejected: [B] drafts rejected in this step.
            last_sampled: [max_num_reqs, 1] last token of each request, by request-state index.
            dp_sync: what `dp_sync_state` was called before vLLM 0.32, which did not hand over γ either.

        Returns:
            [B, num_speculative_steps] int64; the first γ columns are drafts, what the others hold is undefined.
        """
        num_reqs = input_batch.num_reqs
        dp_sync_state = None if older_than("0.30") else dp_sync_state or dp_sync  # 0.29's knows no number of requests
        if dummy_run and dp_sync_state is not None:  # padded to a graph of the target, when other ranks may have fewer
            num_reqs = min(num_reqs, dp_sync_state.num_reqs)
        gamma = num_speculative_tokens
        if gamma is None:
            gamma = self.num_speculative_steps if dummy_run else self.scheduled_drafts
        if gamma == 0:
            return self.draft_tokens[:num_reqs]
        if not dummy_run:
            self._tap.refresh()
        skip_attn = dummy_run and skip_attn_for_dummy_run
        self._copy_request_inputs(num_reqs, input_batch.idx_mapping[:num_reqs], temperature, seeds)
        if dummy_run:  # names requests that are not there
            self.idx_mapping.fill_(-1)
        self._begin(input_batch, num_sampled, num_rejected, last_sampled, writes=not dummy_run)

        sync, num_tokens = None, num_reqs
        if dp_sync_state is not None:
            sync, num_tokens = self._build_uniform_batch_dp_sync(dp_sync_state, num_reqs)
        desc, sync = dispatch_cg_and_sync_dp(
            self._manager,
            num_reqs,
            num_tokens,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=is_profile,
            **{"dp_sync" if older_than("0.32") else "dp_sync_state": sync},
        )
        if desc.cg_mode == CUDAGraphMode.FULL:
            self._replay(desc, gamma)
        else:
            longest = int(input_batch.seq_lens_cpu_upper_bound[:num_reqs].max())
            self.draft_max_seq_len = min(longest + gamma, self.max_model_len)
            across_dp = None if sync is None else sync.num_tokens_across_dp
            if skip_attn:  # the first run compiles the view, and one row would compile it for one row alone
                desc = replace(desc, num_tokens=max(2, desc.num_tokens))
            self._run_without_graph(desc, num_reqs, gamma, input_batch.seq_lens_cpu_upper_bound, across_dp, skip_attn)
        return self.draft_tokens[:num_reqs]

    def _begin(
        self,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        writes: bool,
    ) -> None:
        """Fill the buffers that every draft step reads; where `writes` is false, no row may write KV."""
        num_reqs = input_batch.num_reqs
        self._step.zero_()
        self._limit.zero_()
        self._start.zero_()
        torch.clamp(self._row_numbers, max=num_reqs, out=self.input_buffers.query_start_loc)
        self.input_buffers.input_ids[:num_reqs] = last_sampled.view(-1)[input_batch.idx_mapping]
        if writes:
            blocks = self._num_blocks[input_batch.idx_mapping]
            allocated = (blocks.long() * self._block_size).clamp_(max=self.max_model_len)
            self._limit[:num_reqs] = allocated.masked_fill_(num_sampled[:num_reqs] == 0, 0)
        start = input_batch.seq_lens[:num_reqs] - num_rejected[:num_reqs]
        self._start[:num_reqs] = torch.where(self._limit[:num_reqs] > 0, start, 0)
        if self._rotary_offset is not None:
            self._rotary_offset.zero_()
            if writes:
                offsets = self.model_state.rope_state.prefill_delta.gpu
                self._rotary_offset[:num_reqs] = offsets[input_batch.idx_mapping[:num_reqs]]

    def _replay(self, desc: BatchExecutionDescriptor, gamma: int) -> None:
        assert self._manager is not None
        if not older_than("0.32"):
            for groups in self.attn_groups:
                for group in groups:
                    group.map_to_kernel_block_table(self.block_tables.input_block_tables[group.kv_cache_group_id])
        for _ in range(gamma):
            self._manager.run_fullgraph(desc)

    def _run_without_graph(
        self,
        desc: BatchExecutionDescriptor,
        num_reqs: int,
        gamma: int,
        seq_lens_cpu_upper_bound: torch.Tensor,
        num_tokens_across_dp: torch.Tensor | None,
        skip_attn: bool,
    ) -> None:
        metadata: dict[str, Any] | None = None
        slots: dict[str, torch.Tensor] | None = None
        for step in range(gamma):
            self._place(num_reqs)
            if not skip_attn:
                self._place_slots(num_reqs, desc.num_tokens)
                if metadata is None or not self._updates_metadata:
                    # An upper bound for all the steps that use this metadata.
                    ahead = gamma if self._updates_metadata else step + 1
                    metadata = self._build_metadata(desc, num_reqs, seq_lens_cpu_upper_bound, ahead)
                    mapping = self.block_tables.slot_mappings[:, : desc.num_tokens]
                    slots = build_slot_mappings_by_layer(mapping, self.kv_cache_config)
                else:
                    self._update_metadata(metadata)
            self._forward_and_sample(num_reqs, desc.num_tokens, metadata, slots, num_tokens_across_dp)

    def _build_metadata(
        self, desc: BatchExecutionDescriptor, num_reqs: int, seq_lens_cpu_upper_bound: torch.Tensor, ahead: int
    ) -> dict[str, Any] | None:
        """Attention metadata of one token per request, up to `ahead` tokens behind the last."""
        if older_than("0.30"):
            padded = desc.num_reqs or num_reqs
            old: dict[str, Any] | None = self._build_draft_attn_metadata(
                num_reqs, padded, desc.num_tokens, seq_lens_cpu_upper_bound, ahead
            )
            return old
        return self._build_uniform_attn_metadata(desc, num_reqs, 1, seq_lens_cpu_upper_bound, ahead)

    def _update_metadata(self, metadata: dict[str, Any]) -> None:
        """Bring the attention metadata to this step's sequence lengths, on the device."""
        for groups in self.attn_groups:
            for group in groups:
                group.update_draft_decode_metadata(metadata)

    def _whole_step(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_mode: CUDAGraphMode,
        num_speculative_steps: int = 0,
    ) -> None:
        """What a graph holds; the parameters are those of vLLM's `SpeculatorCudaGraphManager`."""
        self._place(num_reqs)
        self._place_slots(num_reqs, num_tokens)
        self._update_metadata(attn_metadata)
        self._forward_and_sample(num_reqs, num_tokens, attn_metadata, slot_mappings, num_tokens_across_dp)

    def _place(self, num_reqs: int) -> None:
        """Positions and sequence lengths of the step."""
        position = (self._start[:num_reqs] + self._step).clamp_(max=self.max_model_len - 1)
        self.input_buffers.positions[:num_reqs] = position
        if self._rotary_offset is not None:
            self._rotary_positions[:num_reqs] = (position + self._rotary_offset[:num_reqs]).clamp_(min=0)
        # A row that may not write still attends to something: without any key the result would not be a number.
        length = torch.minimum(position + 1, self._limit[:num_reqs].clamp(min=1))
        self.input_buffers.seq_lens[:num_reqs] = length.masked_fill_(self.idx_mapping[:num_reqs] < 0, 0)
        self.input_buffers.seq_lens[num_reqs:] = 0

    def _place_slots(self, num_reqs: int, num_tokens: int) -> None:
        """KV slots of the step, into vLLM's slot-mapping buffer."""
        slots = draft_slots(
            self._start[:num_reqs] + self._step,
            self._limit[:num_reqs],
            self.block_tables.input_block_tables[0][:num_reqs],
            self._block_size,
            1,
        )
        self.block_tables.slot_mappings[0, :num_reqs] = slots[0]
        self.block_tables.slot_mappings[0, num_reqs:num_tokens] = PADDING_SLOT_ID

    def _forward_and_sample(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
    ) -> None:
        """One draft per row, into `draft_tokens` and the next step's input."""
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_tokens,
            num_tokens_across_dp=num_tokens_across_dp,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
        ):
            hidden = self.model(self.input_buffers.input_ids[:num_tokens], self._rotary_positions[:num_tokens])
        tokens = self.sample_draft(
            hidden[:num_reqs],
            self._start[:num_reqs] + self._step,  # vLLM keys a draw by the position before the drawn token
            self.idx_mapping[:num_reqs],
            self.temperature,
            self.seeds,
            self._step,
            self.draft_logits,
        )
        # Rows of no request attended to nothing: what was sampled for them must not reach the embedding.
        tokens = tokens.masked_fill(self.idx_mapping[:num_reqs] < 0, 0)
        self.draft_tokens[:num_reqs].index_copy_(1, self._step.view(1), tokens.unsqueeze(1))
        self.input_buffers.input_ids[:num_reqs] = tokens
        self._step.add_(1).remainder_(self.num_speculative_steps)
