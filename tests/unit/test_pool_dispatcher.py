"""The dispatcher: who makes which sample, without Ray, engines or clocks."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_selfspec.rollout.dispatcher import Dispatcher


def finish_all(dispatcher: Dispatcher, order: random.Random) -> Counter:
    """Run everything to the end in random order; how often each sample was delivered."""
    delivered: Counter = Counter()
    in_flight: list[tuple[int, tuple[int, int, int]]] = []
    while True:
        for worker_id, items in dispatcher.assign().items():
            in_flight += [(worker_id, item.key) for item in items]
        if not in_flight:
            return delivered
        worker_id, key = in_flight.pop(order.randrange(len(in_flight)))
        assert dispatcher.finish(worker_id, key)
        delivered[key] += 1


def test_a_group_stays_on_one_worker_while_others_have_work() -> None:
    dispatcher = Dispatcher()
    for worker_id in range(3):
        dispatcher.add_worker(worker_id, capacity=4)
    for prompt in range(30):
        dispatcher.add_group(0, prompt, num_samples=4, prompt_tokens=10, sample_tokens=5)
    homes: dict[int, set[int]] = {}
    plan = dispatcher.assign()
    while plan:
        for worker_id, items in plan.items():
            for item in items:
                homes.setdefault(item.key[1], set()).add(worker_id)
        for worker_id, items in plan.items():
            for item in items:
                dispatcher.finish(worker_id, item.key)
        plan = dispatcher.assign()
    assert len(homes) == 30
    assert all(len(workers) == 1 for workers in homes.values())


def test_groups_go_to_the_worker_with_the_fewest_outstanding_tokens() -> None:
    dispatcher = Dispatcher()
    dispatcher.add_worker(0, capacity=100)
    dispatcher.add_worker(1, capacity=100)
    dispatcher.add_group(0, 0, num_samples=1, prompt_tokens=1000, sample_tokens=10)
    for prompt in range(1, 6):
        dispatcher.add_group(0, prompt, num_samples=1, prompt_tokens=100, sample_tokens=10)
    plan = dispatcher.assign()
    assert [item.key[1] for item in plan[0]] == [0]
    assert [item.key[1] for item in plan[1]] == [1, 2, 3, 4, 5]


def test_the_tail_moves_what_has_not_begun_to_an_idle_worker() -> None:
    """One big group: the rest of it would wait behind worker 0 while worker 1 idles."""
    dispatcher = Dispatcher()
    dispatcher.add_worker(0, capacity=4)
    dispatcher.add_worker(1, capacity=4)
    dispatcher.add_group(0, 0, num_samples=16, prompt_tokens=10, sample_tokens=5)
    plan = dispatcher.assign()
    assert {worker_id: len(items) for worker_id, items in plan.items()} == {0: 4, 1: 4}
    assert dispatcher.moved[0] == 4


def test_lookahead_is_reclaimed_only_while_another_worker_has_free_places() -> None:
    dispatcher = Dispatcher()
    dispatcher.add_worker(0, capacity=2, lookahead=2)
    dispatcher.add_group(0, 0, num_samples=4, prompt_tokens=0, sample_tokens=5)
    dispatcher.assign()
    assert dispatcher.sent(0) == 4
    assert dispatcher.reclaims() == []
    dispatcher.add_worker(1, capacity=1)
    dispatcher.assign()
    (reclaim,) = dispatcher.reclaims()
    assert reclaim == (0, 1)
    assert dispatcher.reclaims() == []  # not asked twice
    assert dispatcher.give_back(0, [(0, 0, 3)], begun=False) == 1
    assert {worker: [item.key for item in items] for worker, items in dispatcher.assign().items()} == {1: [(0, 0, 3)]}
    assert dispatcher.reclaims() == []  # no place is free any more


def test_a_worker_with_nothing_to_give_back_is_not_asked_again_before_it_finishes_something() -> None:
    dispatcher = Dispatcher()
    dispatcher.add_worker(0, capacity=1, lookahead=2)
    dispatcher.add_group(0, 0, num_samples=3, prompt_tokens=0, sample_tokens=5)
    dispatcher.assign()
    dispatcher.add_worker(1, capacity=2)
    dispatcher.assign()
    assert dispatcher.reclaims() == [(0, 2)]
    dispatcher.give_back(0, [], begun=False)
    assert dispatcher.reclaims() == []
    dispatcher.finish(0, (0, 0, 0))
    assert dispatcher.assign() == {}
    assert dispatcher.reclaims() == [(0, 1)]


def test_a_lost_workers_samples_begin_again_and_its_late_answers_are_dropped() -> None:
    dispatcher = Dispatcher()
    dispatcher.add_worker(0, capacity=2)
    dispatcher.add_worker(1, capacity=2)
    dispatcher.add_group(0, 0, num_samples=2, prompt_tokens=0, sample_tokens=5)
    dispatcher.assign()
    assert sorted(dispatcher.remove_worker(0)) == [(0, 0, 0), (0, 0, 1)]
    assert not dispatcher.finish(0, (0, 0, 0))
    (items,) = dispatcher.assign().values()
    assert [(item.key, item.attempt) for item in items] == [((0, 0, 0), 2), ((0, 0, 1), 2)]
    assert dispatcher.finish(1, (0, 0, 0))
    assert not dispatcher.finish(1, (0, 0, 0))
    assert dispatcher.repeated[0] == 2


def test_cancel_forgets_one_run_only() -> None:
    dispatcher = Dispatcher()
    dispatcher.add_worker(0, capacity=3)
    for run in (0, 1):
        dispatcher.add_group(run, 0, num_samples=4, prompt_tokens=7, sample_tokens=5)
    dispatcher.assign()
    assert dispatcher.cancel(0) == {0: [(0, 0, 0), (0, 0, 1), (0, 0, 2)]}
    assert dispatcher.unfinished(0) == 0
    assert finish_all(dispatcher, random.Random(0)) == {(1, 0, i): 1 for i in range(4)}
    assert dispatcher.outstanding_tokens(0) == 0
    assert dispatcher.in_flight() == 0


@pytest.mark.parametrize("capacity, lookahead", [(0, 0), (1, -1)])
def test_impossible_workers_are_refused(capacity: int, lookahead: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Dispatcher().add_worker(0, capacity, lookahead)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    workers=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_every_sample_is_delivered_once_whatever_happens(
    groups: list[int], workers: list[tuple[int, int]], seed: int
) -> None:
    """Random finishing orders, losses, joins, reclaims and aborts; the sums kept on the side stay true."""
    random_ = random.Random(seed)
    dispatcher = Dispatcher()
    window = {}
    for worker_id, (capacity, lookahead) in enumerate(workers):
        dispatcher.add_worker(worker_id, capacity, lookahead)
        window[worker_id] = capacity + lookahead
    for prompt, samples in enumerate(groups):
        dispatcher.add_group(0, prompt, samples, prompt_tokens=random_.randrange(50), sample_tokens=10)
    delivered: Counter = Counter()
    in_flight: dict[int, list] = {worker_id: [] for worker_id in window}
    next_worker = len(window)
    for _ in range(100_000):
        for worker_id, items in dispatcher.assign().items():
            in_flight[worker_id] += [item.key for item in items]
        for worker_id, at_most in dispatcher.reclaims():
            count = random_.randint(0, at_most)
            keys = [in_flight[worker_id].pop() for _ in range(count)]
            assert dispatcher.give_back(worker_id, keys, begun=False) == count
        for worker_id, items in dispatcher.assign().items():
            in_flight[worker_id] += [item.key for item in items]
        assert dispatcher.in_flight() == sum(map(len, in_flight.values()))
        assert all(len(in_flight[worker_id]) <= window[worker_id] for worker_id in window)
        if not any(in_flight.values()):
            break
        worker_id = random_.choice([worker_id for worker_id in window if in_flight[worker_id]])
        event = random_.random()
        if event < 0.05:
            assert sorted(dispatcher.remove_worker(worker_id)) == sorted(in_flight.pop(worker_id))
            del window[worker_id]
            dispatcher.add_worker(next_worker, 2, 1)
            window[next_worker], in_flight[next_worker] = 3, []
            next_worker += 1
        elif event < 0.1:
            keys = in_flight[worker_id][:]
            in_flight[worker_id].clear()
            assert dispatcher.give_back(worker_id, keys, begun=True) == len(keys)
        else:
            key = in_flight[worker_id].pop(random_.randrange(len(in_flight[worker_id])))
            assert dispatcher.finish(worker_id, key)
            delivered[key] += 1
    assert delivered == {(0, prompt, i): 1 for prompt, samples in enumerate(groups) for i in range(samples)}
    assert dispatcher.unfinished(0) == 0
    assert all(dispatcher.outstanding_tokens(worker_id) == 0 for worker_id in window)
