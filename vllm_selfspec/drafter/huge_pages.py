"""Weights on CPU in pages of 2 MiB, which Linux gives to those that ask.

Products of few rows read every weight once per forward. In pages of 4 KiB the processor looks up a translation and
starts reading ahead anew for each of them, so that a forward takes up to half as long again, the longer the more the
pages are scattered (`docs/measurements.md`). Linux gives larger ones to all programs, to those that ask (`madvise`), or
to none, as it is set, and vLLM does not ask. Asking beforehand is not enough: weights are read, packed and copied by
libraries with allocators of their own, so memory is moved when that is done, where it is.
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

_PASSES, _IN_A_ROW = 8, 192
"""Blocks that Linux refuses are tried again, so often at most and until so many in a row were refused.

Linux makes a huge page by moving what lies in its way. Where that failed it puts off the next attempt and refuses at
once, up to 63 times (`compaction_deferred` in its mm/compaction.c): one refusal says little about the memory.
"""


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
    moved = asked = in_a_row = passes = 0
    blocks: Iterable[int] = ()
    try:
        size = int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
        blocks = _filled_blocks(size, [_span(tensor) for tensor in leave])
        while blocks and passes < _PASSES and in_a_row < _IN_A_ROW:
            passes += 1
            refused = []
            for address in blocks:
                if in_a_row == _IN_A_ROW:
                    break
                if libc.madvise(address, size, _COLLAPSE) == 0:
                    moved += size
                    in_a_row = 0
                    continue
                error = ctypes.get_errno()
                if error == errno.EINVAL:  # an older Linux, which moves it in its own time
                    asked += size if libc.madvise(address, size, _ADVISE) == 0 else 0
                elif error != errno.EAGAIN:  # not just a page that a device holds, or someone uses at this moment
                    refused.append(address)
                    in_a_row += 1
            blocks = refused
    except OSError as error:  # a sandbox without all of Linux's /proc and /sys
        logger.info("selfspec leaves memory in small pages: %s", error)
    note = "; Linux has no more of them" if blocks else ""
    if asked:
        note += f"; {asked >> 20} MiB are left to Linux, which before version 6.1 moves them while it runs"
    logger.info("selfspec moved %d MiB to huge pages in %.1f s%s.", moved >> 20, time.perf_counter() - start, note)
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
    """Where this process has memory to write to that belongs to no file."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0].startswith(("[heap]", "[anon"))):
            begin, end = span.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found
