"""The acceptance alarm: silent at steady acceptance, raised once by a collapse, ready for the next."""

from __future__ import annotations

import random

from vllm_selfspec.control.alarm import AcceptanceAlarm


def feed(alarm: AcceptanceAlarm, acceptance: float, requests: int, seed: int = 0) -> int:
    """Alarms raised by `requests` times 4 drafts of which each is accepted with the given probability."""
    dice = random.Random(seed)
    alarms = 0
    for _ in range(requests):
        accepted = 0
        while accepted < 4 and dice.random() < acceptance:
            accepted += 1
        alarms += alarm.observe(4, accepted)
    return alarms


def test_steady_acceptance_raises_nothing_whatever_its_level():
    for acceptance in (0.1, 0.5, 0.97):
        assert feed(AcceptanceAlarm(), acceptance, 20_000) == 0


def test_a_collapse_raises_it_once_and_recovery_arms_it_again():
    alarm = AcceptanceAlarm()
    assert feed(alarm, 0.97, 5_000) == 0
    assert feed(alarm, 0.05, 600) == 1
    assert feed(alarm, 0.97, 5_000) == 0
    assert feed(alarm, 0.05, 600) == 1
    assert alarm.raised == 2


def test_too_few_drafts_say_nothing():
    alarm = AcceptanceAlarm()
    assert feed(alarm, 1.0, 100) + feed(alarm, 0.0, 100) == 0
    assert not alarm.observe(0, 0)
