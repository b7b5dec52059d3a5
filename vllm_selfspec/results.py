"""The result of a rollout as it is saved: rounds of plain and self-speculative decoding, and what follows from them."""

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from vllm_selfspec.errors import UsageError, write_whole
from vllm_selfspec.provenance import Provenance

Mode = Literal["plain", "selfspec"]


def new_file(path: Path) -> Path:
    """The file of a result, made sure of before anything is measured: nothing is there, and its folder is.

    Raises:
        UsageError: there is a file already, or its folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: the folder {path.parent} cannot be made ({error.strerror})") from None
    if path.exists():
        raise UsageError(f"--out: {path} already exists; name another")
    return path


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SpecCounts(_Model):
    """vLLM's speculative decoding counters over one round.

    A *draft* is one verified proposal of one request in one step; steps that drafted nothing are not counted here.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = Field(default_factory=list)
    """How many drafts had their token at position i (from 0) accepted."""
    draft_lengths: dict[int, int] = Field(default_factory=dict)
    """How many engine steps were scheduled with each draft length, 0 included; empty when that was not counted."""
    decisions: dict[str, int] = Field(default_factory=dict)
    """How many engine steps got their draft length for each reason; empty when that was not counted."""

    def minus(self, earlier: "SpecCounts") -> "SpecCounts":
        """Return what was counted since `earlier`, a reading of the same counters."""
        before = earlier.accepted_per_position + [0] * len(self.accepted_per_position)
        lengths = Counter(self.draft_lengths) - Counter(earlier.draft_lengths)
        return SpecCounts(
            num_drafts=self.num_drafts - earlier.num_drafts,
            num_draft_tokens=self.num_draft_tokens - earlier.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens - earlier.num_accepted_tokens,
            accepted_per_position=[now - then for now, then in zip(self.accepted_per_position, before, strict=False)],
            draft_lengths=dict(sorted(lengths.items())),
            decisions=dict(sorted((Counter(self.decisions) - Counter(earlier.decisions)).items())),
        )

    def plus(self, other: "SpecCounts") -> "SpecCounts":
        """Return the counts of two stretches of time together."""
        positions = max(len(self.accepted_per_position), len(other.accepted_per_position))
        padded = [
            counts.accepted_per_position + [0] * (positions - len(counts.accepted_per_position))
            for counts in (self, other)
        ]
        lengths = Counter(self.draft_lengths) + Counter(other.draft_lengths)
        return SpecCounts(
            num_drafts=self.num_drafts + other.num_drafts,
            num_draft_tokens=self.num_draft_tokens + other.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens + other.num_accepted_tokens,
            accepted_per_position=[sum(pair) for pair in zip(*padded, strict=True)],
            draft_lengths=dict(sorted(lengths.items())),
            decisions=dict(sorted((Counter(self.decisions) + Counter(other.decisions)).items())),
        )

    @property
    def acceptance_per_token(self) -> float | None:
        """Share of drafted tokens that were accepted; None when nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def acceptance_length(self) -> float | None:
        """τ: mean tokens per verified draft, the target's own token included; None when nothing was drafted."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    @property
    def acceptance_per_position(self) -> list[float]:
        """Of the drafts that were accepted up to position i - 1, the share whose token at i was accepted too.

        Where draft lengths were counted, drafts too short to have a position i are left out of its denominator as
        well as can be told from the counters: they are taken to be accepted up to their end as often as others.
        """
        shares: list[float] = []
        reached = float(self.num_drafts)
        drafts_by_length = {n: count for n, count in self.draft_lengths.items() if n > 0}
        total = sum(drafts_by_length.values())
        for position, accepted in enumerate(self.accepted_per_position):
            if total:
                longer = sum(count for n, count in drafts_by_length.items() if n > position)
                at_least = sum(count for n, count in drafts_by_length.items() if n >= position)
                reached *= longer / at_least if at_least else 0.0
            if reached < 1:
                break
            shares.append(min(1.0, accepted / reached))
            reached = float(accepted)
        return shares


class Moment(_Model):
    """The state of an engine at one moment of a round."""

    seconds: float
    running: int
    """Requests in the engine's current batch."""
    steps: int = 0
    """Engine steps since the start of the round; 0 when they are not counted (plain decoding)."""
    draft_length_sum: int = 0
    """The draft lengths of these steps, added up."""


class Round(_Model):
    """One pass over all prompts × samples in one mode."""

    mode: Mode
    index: int
    seconds: PositiveFloat
    """From handing over the first request to the last finished sample."""
    num_samples: int
    num_tokens: int
    """Generated tokens, prompts not included."""
    spec: SpecCounts | None = None
    timeline: list[Moment] = Field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests per second."""
        return self.num_tokens / self.seconds


@with_config(ConfigDict(extra="allow"))
class RolloutSettings(TypedDict):
    """The options of a rollout. Tables and plots need those that are not `NotRequired`."""

    model: str
    prompts: NotRequired[str]
    num_prompts: int
    n: int
    max_tokens: int
    batch: int
    temperature: float
    seed: NotRequired[int]
    ignore_eos: NotRequired[bool]
    compile: NotRequired[bool]
    workers: NotRequired[int | None]
    engine_args: NotRequired[dict[str, Any]]
    speculative_config: dict[str, Any]


class RolloutRun(_Model):
    """All that `vllm-selfspec rollout` measured, and how."""

    kind: Literal["rollout"] = "rollout"
    provenance: Provenance
    settings: RolloutSettings
    startup_seconds: dict[Mode, float]
    rounds: list[Round]
    interrupted: bool = False

    def of(self, mode: Mode) -> list[Round]:
        """Return the rounds of one mode, in order."""
        return [item for item in self.rounds if item.mode == mode]

    def modes(self) -> list[Mode]:
        """Return the modes that have at least one round."""
        modes: tuple[Mode, ...] = ("plain", "selfspec")
        return [mode for mode in modes if self.of(mode)]

    def tokens_per_second(self, mode: Mode) -> float | None:
        """Median over the rounds of one mode."""
        rounds = self.of(mode)
        return statistics.median(item.tokens_per_second for item in rounds) if rounds else None

    def ratios(self) -> list[float]:
        """Tokens per second of selfspec over plain, round by round: each pair ran one right after the other."""
        plain = {item.index: item.tokens_per_second for item in self.of("plain")}
        return [item.tokens_per_second / plain[item.index] for item in self.of("selfspec") if item.index in plain]

    def ratio(self) -> float | None:
        """Median of the round-by-round ratios; None unless both modes ran."""
        ratios = self.ratios()
        return statistics.median(ratios) if ratios else None

    def spec(self) -> SpecCounts:
        """Speculation counters of all rounds together."""
        total = SpecCounts()
        for item in self.rounds:
            if item.spec is not None:
                total = total.plus(item.spec)
        return total

    def summary(self) -> dict[str, Any]:
        """Return the figures of the table, by name."""
        spec = self.spec()
        return {
            "tokens_per_second": {mode: self.tokens_per_second(mode) for mode in self.modes()},
            "ratio": self.ratio(),
            "ratios": self.ratios(),
            "acceptance_per_token": spec.acceptance_per_token,
            "acceptance_length": spec.acceptance_length,
            "acceptance_per_position": spec.acceptance_per_position,
            "draft_lengths": spec.draft_lengths,
            "decisions": spec.decisions,
        }

    def save(self, path: Path) -> None:
        """Write the run as JSON, with its summary beside the raw counts."""
        data = self.model_dump(mode="json") | {"summary": self.summary()}
        write_whole(path, json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "RolloutRun":
        """Read what `save` wrote.

        Raises:
            UsageError: when the file cannot be read or is not a saved rollout.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"there is no file {path}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as JSON ({error})") from None
        if not isinstance(data, dict) or data.get("kind") != "rollout":
            raise UsageError(f"{path} is no saved rollout; name a rollout.json that `vllm-selfspec rollout` wrote")
        data.pop("summary", None)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise UsageError(f"{path}: {field}: {problem['msg']}; the file is damaged or of another version") from None
