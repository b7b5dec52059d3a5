"""The result of `vllm-selfspec bench` as it is saved, and the figures that follow from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, cast

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from vllm_selfspec.errors import UsageError, write_whole
from vllm_selfspec.provenance import Provenance
from vllm_selfspec.results import SpecCounts

Kind = Literal["batch", "rollout"]
Side = Literal["plain", "peer"]
PLAIN = "plain"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Case(_Model):
    """What one round decodes: `batch` requests of one length at once, or a whole rollout `batch` at a time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    batch: int
    temperature: float


class Measured(_Model):
    """One round of one side."""

    side: Side
    index: int
    """Rounds of the two sides with the same index ran one right after the other."""
    case: Case
    seconds: PositiveFloat
    num_samples: int
    num_tokens: PositiveInt
    """Generated tokens, prompts not included."""
    latency_seconds: float
    """Mean over the samples of (time from hand-over to finish) / (tokens of the sample)."""
    spec: SpecCounts | None = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests per second."""
        return self.num_tokens / self.seconds


class Pair(_Model):
    """A peer and the plain engine that ran beside it."""

    peer: str
    speculative_config: dict[str, Any]
    mended: bool
    """Whether this package's mends of upstream faults were applied to an engine of vLLM's own methods."""
    startup_seconds: dict[str, float]
    rounds: list[Measured] = Field(default_factory=list)


class Skipped(_Model):
    """A peer without a result, or with a part of one."""

    peer: str
    reason: str
    failed: bool
    """True: its engine died, or it was not measured to the end. False: it cannot be run here."""


class Part(_Model):
    """A part of the mean cycle."""

    name: str
    seconds: float
    calls: float
    bytes_per_call: int | None = None
    """Weights that one call reads."""

    def limit_seconds(self, bandwidth: float) -> float | None:
        """Time to read the weights at `bandwidth` (bytes/s); None for parts that read none."""
        return None if self.bytes_per_call is None else self.calls * self.bytes_per_call / bandwidth


class Split(_Model):
    """Where the time of the mean decoding cycle goes."""

    name: str
    """`plain` or a peer's name."""
    case: Case
    cycles: int
    seconds: float
    bandwidth: PositiveFloat
    """Bytes per second, measured in the same process."""
    parts: list[Part]

    def part(self, name: str) -> Part | None:
        """Return the part of that name."""
        return next((part for part in self.parts if part.name == name), None)


@dataclass(frozen=True)
class Row:
    """A peer against plain decoding in one case.

    Attributes:
        ratios: round by round, the peer's tokens per second over plain's; of rollouts, plain's makespan over the
            peer's.
        plain: median tokens per second; of rollouts, median makespan in seconds.
        peer: the same.
        token_ratio: of rollouts, the median ratio of tokens per second, which samples of other lengths do not move.
        fastest_ratio: the ratio of either side's fastest round: what is left where a machine that others use slows
            some rounds and not others.
    """

    name: str
    case: Case
    ratios: list[float]
    plain: float
    peer: float
    plain_latency: float
    peer_latency: float
    token_ratio: float
    fastest_ratio: float
    spec: SpecCounts

    @property
    def ratio(self) -> float:
        """Median of the round-by-round ratios."""
        return statistics.median(self.ratios)

    @property
    def draft_length(self) -> float | None:
        """Mean tokens drafted per request: over all steps where steps were counted, else over steps that drafted."""
        steps = sum(self.spec.draft_lengths.values())
        if steps:
            return sum(length * count for length, count in self.spec.draft_lengths.items()) / steps
        return self.spec.num_draft_tokens / self.spec.num_drafts if self.spec.num_drafts else None

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        unit = "tokens_per_second" if self.case.kind == "batch" else "makespan_seconds"
        return {
            "name": self.name,
            **self.case.model_dump(),
            "ratio": self.ratio,
            "ratios": self.ratios,
            f"plain_{unit}": self.plain,
            unit: self.peer,
            "tokens_per_second_ratio": self.token_ratio,
            "fastest_ratio": self.fastest_ratio,
            "plain_seconds_per_token": self.plain_latency,
            "seconds_per_token": self.peer_latency,
            "acceptance_per_token": self.spec.acceptance_per_token,
            "acceptance_length": self.spec.acceptance_length,
            "draft_length": self.draft_length,
        }


@with_config(ConfigDict(extra="allow"))
class BenchSettings(TypedDict):
    """The options of a benchmark. Tables and plots need those that are not `NotRequired`."""

    model: str
    peers: NotRequired[list[str]]
    draft_model: NotRequired[str | None]
    batches: NotRequired[list[int]]
    temperatures: NotRequired[list[float]]
    rounds: NotRequired[int]
    max_tokens: int
    prompts: NotRequired[str]
    num_prompts: int
    rollout: NotRequired[bool]
    rollout_samples: int
    rollout_max_tokens: int
    profile: NotRequired[bool]
    synthetic_acceptance: float | None
    stock_peers: NotRequired[bool]
    compile: bool
    dtype: NotRequired[str]
    max_model_len: NotRequired[int | None]
    seed: NotRequired[int]
    engine_args: NotRequired[dict[str, Any]]


class BenchRun(_Model):
    """All that `vllm-selfspec bench` measured, and how."""

    kind: Literal["bench"] = "bench"
    simulated: bool
    """True: dummy weights, and drafts accepted by a given probability instead of the model's."""
    provenance: list[Provenance] = Field(min_length=1)
    """One per run; several after merging."""
    settings: BenchSettings
    pairs: list[Pair] = Field(default_factory=list)
    skipped: list[Skipped] = Field(default_factory=list)
    splits: list[Split] = Field(default_factory=list)
    interrupted: bool = False

    def peers(self) -> list[str]:
        """Names of the peers that have rounds, in order."""
        return list(dict.fromkeys(pair.peer for pair in self.pairs if pair.rounds))

    def cases(self) -> list[Case]:
        """Cases that have rounds, in order: batches before rollouts, hot before cold, small before large."""
        cases = {item.case for pair in self.pairs for item in pair.rounds}
        return sorted(cases, key=lambda case: (case.kind, -case.temperature, case.batch))

    def row(self, peer: str, case: Case) -> Row | None:
        """The figures of a peer in one case; None unless both sides finished a round of it."""
        both = [
            (plain, other)
            for pair in self.pairs
            if pair.peer == peer
            for plain, other in _neighbours(item for item in pair.rounds if item.case == case)
        ]
        if not both:
            return None
        rollout = case.kind == "rollout"
        token_ratios = [other.tokens_per_second / plain.tokens_per_second for plain, other in both]
        spec = SpecCounts()
        for _, other in both:
            spec = spec.plus(other.spec or SpecCounts())

        def middle(side: int) -> float:
            return statistics.median(pair[side].seconds if rollout else pair[side].tokens_per_second for pair in both)

        def fastest(side: int) -> float:
            rounds = [pair[side] for pair in both]
            return 1 / min(r.seconds for r in rounds) if rollout else max(r.tokens_per_second for r in rounds)

        return Row(
            name=peer,
            case=case,
            ratios=[plain.seconds / other.seconds for plain, other in both] if rollout else token_ratios,
            plain=middle(0),
            peer=middle(1),
            plain_latency=statistics.median(plain.latency_seconds for plain, _ in both),
            peer_latency=statistics.median(other.latency_seconds for _, other in both),
            token_ratio=statistics.median(token_ratios),
            fastest_ratio=fastest(1) / fastest(0),
            spec=spec,
        )

    def rows(self) -> list[Row]:
        """All figures, case by case."""
        found = (self.row(peer, case) for case in self.cases() for peer in self.peers())
        return [row for row in found if row is not None]

    def plain(self, case: Case) -> list[Measured]:
        """Every plain round of a case, beside whichever peer it ran."""
        return [item for pair in self.pairs for item in pair.rounds if item.side == PLAIN and item.case == case]

    def summary(self) -> dict[str, Any]:
        """The figures of the tables, by name."""
        return {
            "simulated": self.simulated,
            "rows": [row.as_dict() for row in self.rows()],
            "skipped": [item.model_dump() for item in self.skipped],
            "splits": [
                {
                    "name": split.name,
                    **split.case.model_dump(),
                    "seconds": split.seconds,
                    "bytes_per_second": split.bandwidth,
                    "parts": {
                        part.name: {"seconds": part.seconds, "limit_seconds": part.limit_seconds(split.bandwidth)}
                        for part in split.parts
                    },
                }
                for split in self.splits
            ],
        }

    def save(self, path: Path) -> None:
        """Write the run as JSON, with its summary beside the raw rounds."""
        data = self.model_dump(mode="json") | {"summary": self.summary()}
        write_whole(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> BenchRun:
        """Read what `save` wrote.

        Raises:
            UsageError: when the file cannot be read or is not a saved benchmark.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"--merge: there is no file {path}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"--merge: {path} cannot be read as JSON ({error})") from None
        if not isinstance(data, dict) or data.get("kind") != "bench":
            raise UsageError(f"--merge: {path} is no saved benchmark; name a bench.json that `bench` wrote")
        data.pop("summary", None)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UsageError(f"--merge: {path}: {where}: {problem['msg']}; the file is of another version") from None


def _neighbours(rounds: Iterable[Measured]) -> list[tuple[Measured, Measured]]:
    by_index: dict[int, dict[Side, Measured]] = {}
    for item in rounds:
        by_index.setdefault(item.index, {})[item.side] = item
    return [(sides["plain"], sides["peer"]) for sides in by_index.values() if len(sides) == 2]


# What may differ between results that go into one table.
_FREE_SETTINGS = ("peers", "batches", "temperatures", "rounds", "rollout", "profile")
# What says nothing of a result without cases of that kind.
_SETTINGS_OF_KIND: dict[str, Kind] = {
    "max_tokens": "batch",
    "rollout_samples": "rollout",
    "rollout_max_tokens": "rollout",
}


def merge(runs: Sequence[BenchRun]) -> BenchRun:
    """Put results of one model and machine together; rounds of the same peer and case are pooled.

    Raises:
        UsageError: when they were measured in different ways, which is named.
    """
    first = runs[0]
    settings = _merged_settings(runs)
    for run in runs[1:]:
        if run.simulated != first.simulated:
            raise UsageError("--merge: one result is simulated and another is not")
        for name in ("hardware", "versions"):
            if run.provenance[0][name] != first.provenance[0][name]:
                raise UsageError(f"--merge: the results are of different {name}")
    configs: dict[str, dict[str, Any]] = {}
    for pair in (pair for run in runs for pair in run.pairs):
        if configs.setdefault(pair.peer, pair.speculative_config) != pair.speculative_config:
            raise UsageError(f"--merge: {pair.peer} was measured with two different speculative configs")
    measured = {pair.peer for run in runs for pair in run.pairs if pair.rounds}
    return BenchRun(
        simulated=first.simulated,
        provenance=[entry for run in runs for entry in run.provenance],
        settings=settings,
        pairs=[pair for run in runs for pair in run.pairs],
        skipped=list(
            {
                (item.peer, item.reason): item
                for run in runs
                for item in run.skipped
                if item.failed or item.peer not in measured
            }.values()
        ),
        splits=list({(split.name, split.case): split for run in runs for split in run.splits}.values()),
        interrupted=any(run.interrupted for run in runs),
    )


def _merged_settings(runs: Sequence[BenchRun]) -> BenchSettings:
    """What all runs have in common; a setting of one kind of case is that of the runs with such cases."""
    merged: dict[str, Any] = {}
    for name in sorted({name for run in runs for name in run.settings} - set(_FREE_SETTINGS)):
        kind = _SETTINGS_OF_KIND.get(name)
        concerned = [run for run in runs if kind is None or any(case.kind == kind for case in run.cases())]
        told = [run.settings.get(name) for run in concerned or runs]
        for value in told:
            if value != told[0]:
                raise UsageError(f"--merge: {name} is {told[0]!r} in one result and {value!r} in another")
        merged[name] = told[0]
    return cast(BenchSettings, merged)
