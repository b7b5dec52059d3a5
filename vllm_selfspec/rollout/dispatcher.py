"""Which worker makes which sample: the bookkeeping of a pool as plain data structures, no Ray, no clock, no threads.

A *group* is one prompt with all its samples; its prompt should be computed once, so a group goes to one worker. Groups
wait in one queue and are given, first come first served, to the worker with the fewest outstanding tokens that has
room. A worker has `capacity` samples decoding at once and may hold `lookahead` more, so that a freed place is filled
without a round trip; the rest of its group waits here. In the tail, when the queue is empty, a worker with free places
takes samples that have not begun from the worker that has most of them waiting.

Cost: O(log W) per sample for W workers. Memory: proportional to what is unfinished.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_selfspec.rollout.types import SampleKey


class Item(NamedTuple):
    """A sample to be made: its key, the tokens it is expected to cost, and which attempt this is."""

    key: SampleKey
    tokens: int
    attempt: int


class _Group(NamedTuple):
    """A prompt whose samples have not been listed yet: a long queue is mostly these."""

    run: int
    prompt_index: int
    num_samples: int
    prompt_tokens: int
    sample_tokens: int

    def items(self) -> deque[Item]:
        run, prompt_index, num_samples, prompt_tokens, sample_tokens = self
        items = deque(Item((run, prompt_index, i), sample_tokens, 1) for i in range(num_samples))
        items[0] = Item((run, prompt_index, 0), sample_tokens + prompt_tokens, 1)
        return items


class Reclaim(NamedTuple):
    """Ask `worker_id` to give back up to `at_most` samples that it has not begun."""

    worker_id: int
    at_most: int


@dataclass(slots=True)
class _Worker:
    worker_id: int
    capacity: int
    window: int
    held: deque[Item] = field(default_factory=deque)
    sent: dict[SampleKey, Item] = field(default_factory=dict)
    tokens: int = 0
    reclaiming: bool = False

    @property
    def room(self) -> int:
        return self.window - len(self.sent)

    @property
    def free(self) -> int:
        return max(0, self.capacity - len(self.sent))


class _Heap:
    """Smallest-first heap of workers whose ranks change: an outdated entry is dropped when it surfaces."""

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[int, int], int]] = []
        self._rank: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._rank)

    def set(self, worker_id: int, rank: tuple[int, int] | None) -> None:
        """Give a worker a new rank; None takes it out."""
        if rank is None:
            self._rank.pop(worker_id, None)
            return
        if self._rank.get(worker_id) == rank:
            return
        self._rank[worker_id] = rank
        heapq.heappush(self._entries, (rank, worker_id))
        if len(self._entries) > 4 * len(self._rank) + 64:
            self._entries = [(current, worker) for worker, current in self._rank.items()]
            heapq.heapify(self._entries)

    def first(self) -> int | None:
        while self._entries:
            rank, worker_id = self._entries[0]
            if self._rank.get(worker_id) == rank:
                return worker_id
            heapq.heappop(self._entries)
        return None


class Dispatcher:
    """See the module's docstring. Every method leaves the bookkeeping consistent; call `assign` after each change."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._queue: deque[_Group | deque[Item]] = deque()
        self._open = _Heap()  # workers with room and nothing of their own to fill it with
        self._waiting = _Heap()  # workers with samples held back here, most first
        self._over = _Heap()  # workers that were sent more than they can decode at once, most first
        self._free = 0
        self._changed: set[int] = set()  # workers whose ranks are out of date: `assign` looks at each of them once
        self._sent = 0
        self._unfinished: dict[int, int] = {}
        self.moved: dict[int, int] = {}
        self.repeated: dict[int, int] = {}

    # -- workers ---------------------------------------------------------------------------------------------------
    def add_worker(self, worker_id: int, capacity: int, lookahead: int = 0) -> None:
        """A worker is ready. `capacity`: samples decoded at once (>= 1); `lookahead`: samples it may hold besides."""
        if worker_id in self._workers:
            raise ValueError(f"worker_id: {worker_id} is in the pool already")
        if capacity < 1 or lookahead < 0:
            raise ValueError(f"capacity and lookahead of worker {worker_id} must be at least 1 and 0")
        worker = _Worker(worker_id, capacity, capacity + lookahead)
        self._workers[worker_id] = worker
        self._free += capacity
        self._changed.add(worker_id)

    def remove_worker(self, worker_id: int) -> list[SampleKey]:
        """A worker is gone: its unfinished samples go to the head of the queue. Returns those it had been sent."""
        worker = self._workers.pop(worker_id)
        self._free -= worker.free
        for heap in (self._open, self._waiting, self._over):
            heap.set(worker_id, None)
        self._changed.discard(worker_id)
        self._sent -= len(worker.sent)
        lost = list(worker.sent.values())
        again = [item._replace(attempt=item.attempt + 1) for item in lost]
        for item in again:
            self.repeated[item.key[0]] = self.repeated.get(item.key[0], 0) + 1
        self._put_back(again + list(worker.held))
        return [item.key for item in lost]

    def owner(self, key: SampleKey) -> int | None:
        """The worker that `key` was sent to. O(W): for reports and tests."""
        return next((worker.worker_id for worker in self._workers.values() if key in worker.sent), None)

    def sent(self, worker_id: int) -> int:
        """Samples that the worker has been sent and has not finished."""
        return len(self._workers[worker_id].sent)

    def sent_keys(self, worker_id: int) -> list[SampleKey]:
        return list(self._workers[worker_id].sent)

    # -- work ------------------------------------------------------------------------------------------------------
    def add_group(self, run: int, prompt_index: int, num_samples: int, prompt_tokens: int, sample_tokens: int) -> None:
        """Queue one prompt: `prompt_tokens` is counted once, with its first sample; `sample_tokens` per sample."""
        if num_samples > 0:
            self._queue.append(_Group(run, prompt_index, num_samples, prompt_tokens, sample_tokens))
            self._unfinished[run] = self._unfinished.get(run, 0) + num_samples

    def finish(self, worker_id: int, key: SampleKey) -> bool:
        """`worker_id` delivered `key`. False: it is not that worker's (any more); drop what it delivered."""
        worker = self._workers.get(worker_id)
        item = worker.sent.pop(key, None) if worker is not None else None
        if worker is None or item is None:
            return False
        worker.reclaiming = False
        self._released(worker, item)
        left = self._unfinished[key[0]] - 1
        if left:
            self._unfinished[key[0]] = left
        else:
            del self._unfinished[key[0]]
        return True

    def give_back(self, worker_id: int, keys: Iterable[SampleKey], begun: bool, moved: bool = True) -> int:
        """`worker_id` returns samples unfinished: they go to the head of the queue. Returns how many were its own.

        `begun` says that the worker had begun them (they were aborted): the next attempt is another one. Else they
        count as moved to another worker, unless `moved` says that this is not what they are taken for.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            return 0
        items = []
        for key in keys:
            item = worker.sent.pop(key, None)
            if item is None:
                continue
            self._released(worker, item)
            if begun:
                item = item._replace(attempt=item.attempt + 1)
                self.repeated[key[0]] = self.repeated.get(key[0], 0) + 1
            elif moved:
                self.moved[key[0]] = self.moved.get(key[0], 0) + 1
            items.append(item)
        if items:  # else it had begun all of them: asking again makes no sense before it has finished one
            worker.reclaiming = False
        self._changed.add(worker_id)
        self._put_back(items)
        return len(items)

    def cancel(self, run: int) -> dict[int, list[SampleKey]]:
        """Forget a run. Returns what its workers have been sent: abort these there."""
        self._queue = deque(group for group in self._queue if _run_of(group) != run)
        self._unfinished.pop(run, None)
        sent: dict[int, list[SampleKey]] = {}
        for worker in self._workers.values():
            held = [item for item in worker.held if item.key[0] == run]
            if held:
                worker.held = deque(item for item in worker.held if item.key[0] != run)
                worker.tokens -= sum(item.tokens for item in held)
            keys = [key for key in worker.sent if key[0] == run]
            for key in keys:
                self._released(worker, worker.sent.pop(key))
            if keys:
                sent[worker.worker_id] = keys
            if keys or held:
                self._changed.add(worker.worker_id)
        return sent

    def forget(self, run: int) -> None:
        """Drop the counters of a finished run."""
        self.moved.pop(run, None)
        self.repeated.pop(run, None)

    def unfinished(self, run: int) -> int:
        return self._unfinished.get(run, 0)

    def outstanding_tokens(self, worker_id: int) -> int:
        return self._workers[worker_id].tokens

    def in_flight(self) -> int:
        """Samples that workers have been sent and have not finished."""
        return self._sent

    # -- decisions -------------------------------------------------------------------------------------------------
    def assign(self) -> dict[int, list[Item]]:
        """What to send to which worker now. The samples count as sent when this returns."""
        plan: dict[int, list[Item]] = {}
        for worker_id in self._changed:
            self._fill(self._workers[worker_id], plan)
        self._changed.clear()
        while self._queue and (open_id := self._open.first()) is not None:
            worker = self._workers[open_id]
            group = self._queue.popleft()
            worker.held = group.items() if isinstance(group, _Group) else group
            worker.tokens += sum(item.tokens for item in worker.held)
            self._fill(worker, plan)
        if not self._queue:
            self._level(plan)
        return plan

    def reclaims(self) -> list[Reclaim]:
        """In the tail: workers to ask for samples that they hold but have not begun, as many as others have places.

        To be called right after `assign`.
        """
        plan: list[Reclaim] = []
        if self._queue:
            return plan
        wanted = self._free
        while wanted > 0 and (worker_id := self._over.first()) is not None:
            worker = self._workers[worker_id]
            count = min(wanted, len(worker.sent) - worker.capacity)
            worker.reclaiming = True
            self._rank(worker)
            plan.append(Reclaim(worker_id, count))
            wanted -= count
        return plan

    # -- internals -------------------------------------------------------------------------------------------------
    def _level(self, plan: dict[int, list[Item]]) -> None:
        """Move samples that are held back here to workers with free places, half of the fullest worker's at a time."""
        while self._free and (victim_id := self._waiting.first()) is not None:
            thief_id = self._open.first()
            if thief_id is None or thief_id == victim_id:
                return
            victim, thief = self._workers[victim_id], self._workers[thief_id]
            if not thief.free:
                return
            count = min(thief.free, (len(victim.held) + 1) // 2)
            for _ in range(count):
                item = victim.held.pop()
                victim.tokens -= item.tokens
                thief.held.append(item)
                thief.tokens += item.tokens
                self.moved[item.key[0]] = self.moved.get(item.key[0], 0) + 1
            self._rank(victim)
            self._fill(thief, plan)

    def _fill(self, worker: _Worker, plan: dict[int, list[Item]]) -> None:
        """Send a worker its own held samples as far as its window reaches."""
        count = min(worker.room, len(worker.held))
        if count > 0:
            self._free -= worker.free
            items = [worker.held.popleft() for _ in range(count)]
            worker.sent.update((item.key, item) for item in items)
            self._free += worker.free
            self._sent += count
            plan.setdefault(worker.worker_id, []).extend(items)
        self._rank(worker)

    def _released(self, worker: _Worker, item: Item) -> None:
        """`item` has just left `worker.sent`."""
        worker.tokens -= item.tokens
        self._sent -= 1
        if len(worker.sent) < worker.capacity:
            self._free += 1
        self._changed.add(worker.worker_id)

    def _put_back(self, items: list[Item]) -> None:
        """To the head of the queue, samples of one prompt together."""
        groups: dict[tuple[int, int], deque[Item]] = {}
        for item in items:
            groups.setdefault(item.key[:2], deque()).append(item)
        self._queue.extendleft(reversed(groups.values()))

    def _rank(self, worker: _Worker) -> None:
        worker_id, sent, held = worker.worker_id, len(worker.sent), len(worker.held)
        is_open = sent < worker.window and not held
        self._open.set(worker_id, (sent >= worker.capacity, worker.tokens) if is_open else None)
        self._waiting.set(worker_id, (-held, 0) if held else None)
        over = sent - worker.capacity
        self._over.set(worker_id, (-over, 0) if over > 0 and not worker.reclaiming else None)


def _run_of(group: _Group | deque[Item]) -> int:
    return group.run if isinstance(group, _Group) else group[0].key[0]
