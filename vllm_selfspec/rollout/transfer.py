"""vLLM weight-transfer backend "selfspec_file": weights pass through safetensors files (or `/dev/shm`) of one host.

vLLM's own backends need CUDA. This one runs anywhere, through the same official protocol:
`init_weight_transfer_engine`, `start_weight_update`, `update_weights` with `{"path": ...}` (as often as there are
parts), `finish_weight_update`. Weights are in checkpoint format and are loaded by vLLM's layerwise reload, tensor
parallel shards included.
Base classes: `vllm/distributed/weight_transfer/base.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import safe_open
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_selfspec.plugin import TIED_LM_HEAD
from vllm_selfspec.rollout.weights import BACKEND, check_finite, read_index, save_state, weight_files


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: files describe themselves."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """`path`: a safetensors file, or a folder of them, that every worker process can read."""

    path: str


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Worker side. A failed update leaves the model runnable but with a mixture of old and new layers: load again."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        TIED_LM_HEAD.apply()

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Load one file or folder.

        Raises:
            WeightUpdateError: it cannot be read or holds a non-finite value; the model still has its old weights if
                this was the first part of the update.
            ValueError: vLLM's loader refused a tensor.
        """
        try:
            check_finite(read_index(update_info.path))
            self.model.load_weights(_tensors(update_info.path))
        except BaseException:
            self._abandon_update()
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass

    def _abandon_update(self) -> None:
        """Put the old tensors of every layer that is not complete back in place.

        vLLM's worker ends the session on an error but leaves such layers on the meta device with the tensors that they
        had buffered; the next update would then complete them from a mixture of both and drop the rest without a word.
        """
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(path):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                yield name, tensors.get_tensor(name)


@dataclass
class FileTrainerInitInfo(TrainerInitInfo):
    """`path`: the file that each round of weights is written to. It must be visible to trainer and workers."""

    backend: ClassVar[str] = BACKEND
    path: str


class FileTrainerWeightTransferEngine(TrainerWeightTransferEngine[FileTrainerInitInfo]):
    """Trainer side: writes the `WeightSource` to a file and drives the protocol through any of vLLM's clients."""

    init_info_cls = FileTrainerInitInfo

    def __init__(
        self, path: str, *, client: VLLMWeightSyncClient, source: WeightSource | None = None, is_sender: bool = True
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._path = Path(path)

    @classmethod
    def trainer_init(
        cls, init_info: FileTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        if source is None:
            raise ValueError(f"source: the {BACKEND} backend sends whole checkpoints; pass a WeightSource")
        engine = cls(init_info.path, client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            client.init_weight_transfer_engine({})
        return engine

    def send_weights(self, weight_version: str | None = None) -> None:
        """Gather on every rank; rank 0 writes the file and runs start, update, finish.

        Raises:
            ValueError: rank 0 does not get every parameter; nothing has been written or sent.
        """
        assert self.source is not None
        state = {name: tensor for name, tensor in _full_tensors(self.source) if tensor is not None}
        if not self.is_sender:
            return
        if missing := [name for name in _names(self.source) if name not in state]:
            raise ValueError(
                f"source: rank 0 gets {len(state)} parameters and not {missing[0]}, but the {BACKEND} backend writes "
                "from rank 0 alone: gather them all there."
            )
        save_state(state, self._path)
        self.client.start_weight_update()
        self.client.update_weights({"path": str(self._path)})
        self.client.finish_weight_update(weight_version)


def _full_tensors(source: WeightSource) -> Iterator[tuple[str, torch.Tensor | None]]:
    """What this rank gathers. vLLM 0.32 iterates a source, with None for what other ranks hold; 0.33 has a method."""
    return iter(source.iter_full() if hasattr(source, "iter_full") else source)


def _names(source: WeightSource) -> list[str]:
    """All parameters of the model: `metadata` is a method in vLLM 0.32 and a property in 0.33."""
    metadata = source.metadata
    return [parameter.name for parameter in (metadata() if callable(metadata) else metadata)]
