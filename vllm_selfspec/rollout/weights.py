"""Weights on their way from a trainer to the workers: files, their check, and vLLM's weight-transfer registry.

A version of the weights is a safetensors file, or a folder of them, in checkpoint format: the names and shapes of the
checkpoint that the engine was started from. On one host a file under `/dev/shm` is shared memory. Files are read here
without torch: the driver process of a rollout need not import it.
"""

import itertools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_selfspec.rollout.types import WeightUpdateError

BACKEND = "selfspec_file"
"""Name of the weight-transfer backend, for `weight_transfer_config={"backend": "selfspec_file"}`."""

_TIED_HEAD = "lm_head.weight"
_INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
_EXPONENTS = {"F64": (np.uint64, 0x7FF << 52), "F32": (np.uint32, 0xFF << 23), "F16": (np.uint16, 0x1F << 10)}
_EXPONENTS["BF16"] = (np.uint16, 0xFF << 7)
_EXPONENTS["F8_E5M2"] = (np.uint8, 0x1F << 2)
_CHUNK_BYTES = 64 << 20


def register_weight_transfer() -> None:
    """Make the backend known to vLLM's factories, worker side and trainer side. May be called any number of times.

    It must run in every process that builds a vLLM worker, so a general plugin calls it. The engine classes themselves
    are imported by vLLM when a configuration first names the backend.
    """
    from vllm_selfspec.plugin import FIRST_WHOLE_VLLM, older_than

    if older_than(FIRST_WHOLE_VLLM):  # has another protocol
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    module = "vllm_selfspec.rollout.transfer"
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, module, "FileWeightTransferEngine")
    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(BACKEND, module, "FileTrainerWeightTransferEngine")


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of one version, sorted by name.

    Raises:
        WeightUpdateError: nothing is there.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    files = sorted(root.glob("*.safetensors")) if root.is_dir() else []
    index = root / "model.safetensors.index.json"
    if index.is_file():  # what it does not name is another copy, as vLLM takes it
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise WeightUpdateError(f"weights: {index} cannot be read ({error!r}); save it again") from error
        files = [file for file in files if file.name in named]
    else:  # Mistral's own format lies beside the usual one
        files = [file for file in files if not file.name.startswith("consolidated")] or files
    if not files:
        raise WeightUpdateError(
            f"weights: {root} is neither a safetensors file nor a folder that holds one; save the weights there first"
        )
    return files


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: byte range [begin, end) of `file`, dtype in safetensors' spelling."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_index(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Names, dtypes, shapes and places of all tensors, from the file headers alone.

    Raises:
        WeightUpdateError: a file is missing, cut short or no safetensors file, or two files hold the same name.
    """
    index: dict[str, TensorEntry] = {}
    for file in weight_files(path):
        try:
            size = file.stat().st_size
            with file.open("rb") as stream:
                (header_bytes,) = struct.unpack("<Q", stream.read(8))
                if header_bytes > size - 8:
                    raise ValueError("its header is cut short")
                header = json.loads(stream.read(header_bytes))
        except (OSError, ValueError, struct.error) as error:
            raise WeightUpdateError(
                f"weights: {file} cannot be read as safetensors ({error}); save it again"
            ) from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            if end > size:
                raise WeightUpdateError(f"weights: {file} is cut short inside tensor {name}; save it again")
            if name in index:
                raise WeightUpdateError(
                    f"weights: tensor {name} is in {index[name].file} and in {file}; keep one of them"
                )
            index[name] = TensorEntry(file, entry["dtype"], tuple(entry["shape"]), begin, end)
    return index


def check_layout(index: Mapping[str, TensorEntry], reference: Mapping[str, TensorEntry]) -> None:
    """Refuse weights whose names or shapes are not those of `reference`.

    A partial update is refused too: a worker that is restarted could not be brought to that version. `lm_head.weight`
    may be present or absent, since checkpoints with tied embeddings are saved both ways.

    Raises:
        WeightUpdateError: names the first tensor that does not fit.
    """
    for name, entry in reference.items():
        if name not in index:
            if name == _TIED_HEAD:
                continue
            raise WeightUpdateError(
                f"weights: tensor {name} is missing; save all tensors of the model, not only changes"
            )
        if index[name].shape != entry.shape:
            raise WeightUpdateError(
                f"weights: tensor {name} has shape {list(index[name].shape)} but the model's has {list(entry.shape)}; "
                "save a checkpoint of the same model"
            )
    for name in index:
        if name not in reference and name != _TIED_HEAD:
            raise WeightUpdateError(f"weights: the model has no tensor {name}; save under the names of its checkpoint")


def check_finite(index: Mapping[str, TensorEntry]) -> None:
    """Refuse infinities and NaNs. Reads every float tensor once, 64 MiB at a time.

    Raises:
        WeightUpdateError: names the first bad tensor and element.
    """
    for name, entry in index.items():
        if entry.dtype in _INTEGERS:
            continue
        position = 0
        for bits in _chunks(entry):
            bad = _non_finite(bits, entry.dtype, name)
            if bad.any():
                where = position + int(np.argmax(bad))
                raise WeightUpdateError(
                    f"weights: tensor {name} holds a non-finite value at flat index {where}; "
                    "lower the learning rate or clip gradients, and send finite weights"
                )
            position += bits.size


def _chunks(entry: TensorEntry) -> Iterator[np.ndarray]:
    unit = np.dtype(_EXPONENTS[entry.dtype][0] if entry.dtype in _EXPONENTS else np.uint8)
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            data = stream.read(min(left, _CHUNK_BYTES))
            if not data:
                raise WeightUpdateError(f"weights: {entry.file} became shorter while it was read; save it again")
            left -= len(data)
            yield np.frombuffer(data, dtype=unit)


def _non_finite(bits: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """IEEE 754: a number is infinite or NaN exactly if all its exponent bits are set. float8 E4M3 has NaN only."""
    if dtype == "F8_E4M3":
        return (bits & 0x7F) == 0x7F
    if dtype not in _EXPONENTS:
        raise WeightUpdateError(f"weights: tensor {name} has dtype {dtype}, which cannot be checked; save a float type")
    mask = bits.dtype.type(_EXPONENTS[dtype][1])
    return (bits & mask) == mask


@dataclass(frozen=True)
class WeightVersion:
    """One version of the weights, as the pool remembers it to send it again (restart, roll-back).

    `path` None is the checkpoint that the engines are started from, when that is no local folder. `stamp` holds name,
    size and modification time (ns) of each file: a version whose files were changed since is not that version any more.
    """

    version: int
    path: str | None
    stamp: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def from_path(cls, version: int, path: str | os.PathLike[str]) -> "WeightVersion":
        return cls(version, str(Path(path).absolute()), _stamp(path))

    def check_unchanged(self) -> None:
        """Raises WeightUpdateError when the files are not those that were loaded first."""
        if self.path is not None and _stamp(self.path) != self.stamp:
            raise WeightUpdateError(
                f"weights: the files of version {self.version} in {self.path} were changed after they were loaded; "
                "write each version to a new place and keep it until the next one is loaded"
            )


def _stamp(path: str | os.PathLike[str]) -> tuple[tuple[str, int, int], ...]:
    stats = ((file.name, file.stat()) for file in weight_files(path))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state dict (torch tensors, any device) as one safetensors file, complete or not at all.

    Raises:
        WeightUpdateError: the file cannot be written (a full disk, for one).
    """
    from safetensors.torch import save_file

    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    # safetensors refuses tensors that share memory (tied embeddings do), hence the clone.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(partial), metadata={"format": "pt"})
        partial.replace(target)
    except Exception as error:  # safetensors reports a full disk with an exception type of its own
        partial.unlink(missing_ok=True)
        raise WeightUpdateError(
            f"weights: cannot write {target} ({error}); free space or choose another folder"
        ) from error


class WeightStore:
    """Folder of the versions that were handed over as state dicts. Keeps the last two: the current and the one before.

    In shared memory where there is enough of it, so a worker on the same host reads what the trainer wrote without a
    disk between them.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._own = folder is None
        self._folder = Path(folder) if folder is not None else None
        self._kept: list[Path] = []
        self._numbers = itertools.count()

    def put(self, state: Mapping[str, Any], version: int) -> Path:
        """Write `state`; returns its path."""
        if self._folder is None:
            needed = 3 * sum(tensor.nbytes for tensor in state.values())
            shm = Path("/dev/shm")
            parent = str(shm) if shm.is_dir() and shutil.disk_usage(shm).free > needed else None
            self._folder = Path(tempfile.mkdtemp(prefix="selfspec-weights-", dir=parent))
        # A version's number may come again while its earlier file is kept.
        path = self._folder / f"version-{version}-{next(self._numbers)}.safetensors"
        save_state(state, path)
        return path

    def keep(self, path: Path) -> None:
        """`path` became the current version: drop all but it and the one before."""
        self._kept.append(path)
        while len(self._kept) > 2:
            self._kept.pop(0).unlink(missing_ok=True)

    def drop(self, path: Path) -> None:
        """`path` was refused."""
        path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what this store wrote."""
        for path in self._kept:
            path.unlink(missing_ok=True)
        self._kept.clear()
        if self._own and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
