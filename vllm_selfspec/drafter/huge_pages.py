"""Weights on CPU in pages of 2 MiB, which Linux gives to those that ask.

Products of few rows read every weight once per forward. In pages of 4 KiB the processor looks up a translation and
starts reading ahead anew for each of them: the products of one draft with Qwen2.5-0.5B's int4 weights take 15 ms then,
and 10 ms in huge pages (`docs/cost.md`). Many distributions give huge pages to no program that does not ask for them,
and vLLM does not ask. Asking beforehand is not enough: weights are read, packed and copied by libraries with their own
allocators, so memory is moved after that, where it is.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_selfspec.provenance import huge_page_setting

logger = init_logger("vllm.selfspec")

_ADVISE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE (Linux 6.1), of Linux's asm-generic/mman-common.h
_PRESENT, _EXCLUSIVE = np.uint64(1 << 63), np.uint64(1 << 56)  # of a page, in pagemap: Linux's admin-guide/mm/pagemap

WORTH_IT = 32 << 20
"""Bytes of weights from which on moving a process's memory is worth the time: smaller ones stay in the caches."""

_REFUSALS = 16
"""After so many blocks that cannot be moved, no more are tried."""


def move_to_huge_pages(leave: Iterable[torch.Tensor] = ()) -> int:
    """Move what this process holds in memory into huge pages; no address and no value changes.

    Left where it is: what files and other processes share, and what is mostly untouched, so that little memory is
    added. What has been moved costs nothing the next time.

    Args:
        leave: large tensors that are not worth the time.

    Returns:
        Bytes that lie in huge pages now, of those that were considered.
    """
    if huge_page_setting() not in ("always", "madvise"):
        return 0
    start = time.perf_counter()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.malloc_trim(0)  # what loading has freed goes back first
    size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    moved = asked = refused = 0
    try:
        for address in _filled_blocks(size, [_span(tensor) for tensor in leave]):
            if libc.madvise(address, size, _COLLAPSE) == 0:
                moved += size
            elif ctypes.get_errno() == errno.EINVAL and libc.madvise(address, size, _ADVISE) == 0:
                asked += size  # an older Linux, which moves it in its own time
            else:
                refused += 1  # a page is in use just now, or memory is too fragmented
                if refused == _REFUSALS:
                    break
    except OSError as error:  # a sandbox without Linux's /proc
        logger.info("selfspec leaves memory in small pages: %s", error)
    logger.info(
        "selfspec moved %d MiB to huge pages in %.1f s, asked Linux to move another %d MiB in time%s.",
        moved >> 20,
        time.perf_counter() - start,
        asked >> 20,
        "; it has no more of them" if refused == _REFUSALS else "",
    )
    return moved


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _filled_blocks(size: int, leave: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Addresses of blocks of `size` bytes, at least half of them in memory and all of that this process's alone."""
    pages = size // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for begin, end in _anonymous_mappings():
            first, last = -(-begin // size), end // size
            for block in range(first, last):
                if any(low <= block * size < high for low, high in leave):
                    continue
                entries = np.frombuffer(os.pread(pagemap.fileno(), 8 * pages, 8 * pages * block), dtype=np.uint64)
                present = entries & _PRESENT != 0
                if 2 * np.count_nonzero(present) >= pages and np.all(entries[present] & _EXCLUSIVE):
                    yield block * size


def _anonymous_mappings() -> list[tuple[int, int]]:
    """Where this process has memory to write to that belongs to no file and no stack."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0].startswith(("[heap]", "[anon"))):
            begin, end = span.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found
