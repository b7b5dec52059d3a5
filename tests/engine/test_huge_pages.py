"""Memory moves to huge pages where it is: the same values at the same addresses, and nothing of others is touched."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import drafter_of, engine, generate, greedy

from vllm_selfspec.drafter import huge_pages
from vllm_selfspec.drafter.huge_pages import move_to_huge_pages
from vllm_selfspec.provenance import huge_page_setting

MIB = 1 << 20
KERNEL = tuple(int(part) for part in platform.release().split(".")[:2])

on_request = pytest.mark.skipif(
    huge_page_setting() != "madvise" or KERNEL < (6, 1), reason="Linux moves memory to huge pages on request here"
)


def memory(size: int) -> tuple[np.ndarray, int]:
    """Untouched memory of this process alone as bytes, and its address.

    It is a mapping of its own: pages without rights keep Linux from joining it with its neighbours.
    """
    page = mmap.PAGESIZE
    mapped = mmap.mmap(-1, size + 2 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = np.frombuffer(mapped, dtype=np.uint8)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for guard in (everything.ctypes.data, everything.ctypes.data + size + page):
        assert protect(guard, page, 0) == 0
    values = everything[page:-page]
    return values, values.ctypes.data


def kib(address: int, fact: str) -> int:
    """What Linux says of the mapping that holds an address: "Rss" or "AnonHugePages", in KiB."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            begin, end = (int(bound, 16) for bound in name.split("-"))
            inside = begin <= address < end
        elif inside and name == f"{fact}:":
            return int(rest[0])
    raise AssertionError(f"no mapping holds {address:x}")


@on_request
def test_filled_memory_moves_and_keeps_its_values() -> None:
    values, address = memory(32 * MIB)
    values[:] = np.random.default_rng(0).integers(0, 256, values.size, dtype=np.uint8)
    checksum = values.copy()
    moved = move_to_huge_pages()
    assert kib(address, "AnonHugePages") >= 16 * 1024  # not all, where other memory is scattered
    assert moved >= 16 * MIB
    assert np.array_equal(values, checksum)


@on_request
def test_memory_that_is_mostly_untouched_stays_as_it_is() -> None:
    values, address = memory(32 * MIB)
    values[:: 2 * MIB] = 1
    resident = kib(address, "Rss")
    move_to_huge_pages()
    assert kib(address, "Rss") == resident
    assert values.sum() == 16


@on_request
def test_what_is_to_be_left_stays_as_it_is() -> None:
    values, address = memory(32 * MIB)
    values[:] = 1
    move_to_huge_pages(leave=[torch.frombuffer(values, dtype=torch.uint8)[16 * MIB :]])  # all of its storage is meant
    assert kib(address, "AnonHugePages") == 0


@on_request
def test_what_another_process_shares_stays_shared() -> None:
    """Moving it would take a copy: an engine that is forked from a trainer would copy the trainer's memory."""
    values, address = memory(32 * MIB)
    values[:] = 1
    go = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go[0], 1)
        os._exit(0)
    try:
        move_to_huge_pages()
        assert kib(address, "AnonHugePages") == 0
    finally:
        os.write(go[1], b".")
        os.waitpid(child, 0)
        for end in go:
            os.close(end)
    move_to_huge_pages()
    assert kib(address, "AnonHugePages") >= 16 * 1024


class RefusingLinux:
    """libc of a Linux that refuses with an error what `refused` names, or grants it once in `every` times."""

    def __init__(self, error: int, refused: set[int], every: int = sys.maxsize) -> None:
        self.asked: list[int] = []
        self.granted: list[int] = []
        self.error, self.refused, self.every = error, refused, every
        self.madvise = Madvise(self)
        self.malloc_trim = lambda _: 1


class Madvise:
    argtypes: Any = None

    def __init__(self, linux: RefusingLinux) -> None:
        self._linux = linux

    def __call__(self, address: int, size: int, advice: int) -> int:
        linux = self._linux
        linux.asked.append(advice)
        if advice not in linux.refused or len(linux.asked) % linux.every == 0:
            linux.granted.append(address)
            return 0
        ctypes.set_errno(linux.error)
        return -1


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RefusingLinux]]:
    def install(error: int, refused: set[int], every: int = sys.maxsize) -> RefusingLinux:
        linux = RefusingLinux(error, refused, every)
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: linux)
        monkeypatch.setattr(huge_pages, "huge_page_setting", lambda: "madvise")
        return linux

    yield install


def test_an_older_linux_is_asked_to_move_it_in_its_own_time(refusing: Any) -> None:
    values, _ = memory(32 * MIB)
    values[:] = 1
    linux = refusing(errno.EINVAL, {25})
    assert move_to_huge_pages() == 0
    assert linux.asked.count(25) == linux.asked.count(14) >= 15


def test_no_more_is_asked_for_where_memory_is_too_fragmented(refusing: Any) -> None:
    values, _ = memory(64 * MIB)
    values[:] = 1
    linux = refusing(errno.ENOMEM, {14, 25})
    assert move_to_huge_pages() == 0
    assert linux.asked == [25] * 192


def test_refusals_in_between_do_not_keep_the_rest_from_moving(refusing: Any) -> None:
    """Linux refuses up to 63 times at once after it failed to make a huge page, however much memory there is."""
    values, address = memory(64 * MIB)
    values[:] = 1
    linux = refusing(errno.ENOMEM, {25}, every=3)
    assert move_to_huge_pages() == 2 * MIB * len(linux.granted)
    ours = set(range(-(-address // (2 * MIB)) * 2 * MIB, address + 62 * MIB, 2 * MIB))
    assert len(ours & set(linux.granted)) > len(ours) * 0.9
    assert len(set(linux.granted)) == len(linux.granted)


def test_memory_that_is_in_use_just_now_does_not_keep_the_rest_from_moving(refusing: Any) -> None:
    values, _ = memory(64 * MIB)
    values[:] = 1
    linux = refusing(errno.EAGAIN, {25})
    assert move_to_huge_pages() == 0
    assert set(linux.asked) == {25}
    assert len(linux.asked) >= 31


def test_where_linux_gives_none_it_is_not_asked(refusing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    linux = refusing(errno.ENOMEM, {25})
    for setting in ("never", ""):
        monkeypatch.setattr(huge_pages, "huge_page_setting", lambda setting=setting: setting)
        assert move_to_huge_pages() == 0
    assert linux.asked == []


def test_an_engine_moves_its_weights_when_all_has_its_memory_and_when_they_have_changed(
    tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[torch.Tensor]] = []
    monkeypatch.setattr(huge_pages, "move_to_huge_pages", lambda leave=(): calls.append(list(leave)))
    monkeypatch.setattr(huge_pages, "WORTH_IT", 0)
    selfspec = {"num_speculative_tokens": 3, "control": {"mode": "fixed"}}
    with engine(tiny("llama"), selfspec) as llm:
        cache = drafter_of(llm)._runner.kv_caches
        for moves in (1, 2):
            generate(llm, [[7, 11, 13]], greedy(8))
            assert len(calls) == moves
            assert cache and all(left is kept for left, kept in zip(calls[-1], cache, strict=True))
            llm.collective_rpc("reload_weights")


def test_small_models_are_not_worth_it(tiny: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "move_to_huge_pages", lambda leave=(): pytest.fail("was called"))
    with engine(tiny("llama"), {"num_speculative_tokens": 3, "control": {"mode": "fixed"}}) as llm:
        generate(llm, [[7, 11, 13]], greedy(8))
