"""What goes into and comes out of a rollout: requests, samples, statistics and the errors of this package.

Nothing here imports vLLM, Ray or torch. Token counts are in tokens, times in seconds.
"""

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SampleKey = tuple[int, int, int]
"""(run, prompt index, sample index): names one sample of one `generate` call."""


class RolloutError(RuntimeError):
    """Base class: one sentence that says what is wrong and how to mend it."""


class InvalidRequestError(RolloutError, ValueError):
    """The caller's prompts, sampling parameters or settings cannot be used; nothing was generated for them."""


class WorkerDeadError(RolloutError):
    """A worker's process or its engine is gone. The pool restarts it; a lone worker must be built again."""


class PoolFailedError(RolloutError):
    """No worker is left, or one could not be started."""


class WeightUpdateError(RolloutError):
    """A weight update was refused or failed. Every worker holds the version that it held before."""


class OutputFullError(RolloutError):
    """Samples could not be written.

    Attributes:
        written: number of samples that are complete in the file.
        unwritten: finished samples that are in memory only.
    """

    def __init__(self, message: str, written: int, unwritten: "list[Sample]") -> None:
        super().__init__(message)
        self.written = written
        self.unwritten = unwritten


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Model):
    """One finished sample.

    `logprobs[i]` is the target model's log probability (natural logarithm, vLLM's `logprobs_mode`) of `token_ids[i]`,
    whatever drafted it. `weight_version` is the version that made every token of the sample.
    """

    prompt_index: int = Field(ge=0)
    sample_index: int = Field(ge=0)
    token_ids: list[int]
    text: str | None = Field(default=None, description="None when the engine has no tokenizer")
    logprobs: list[float] | None = Field(default=None, description="None when they were not asked for")
    finish_reason: str
    worker_id: int = Field(ge=0)
    weight_version: int = Field(ge=0)
    attempt: int = Field(default=1, ge=1, description="how often this sample was begun, counting the one that ended")


class GenerateRequest(_Model):
    """One prompt and those of its samples that a worker shall make.

    `samples` holds (sample index, attempt). Sampling parameters are vLLM's own names; `n` is not one of them here. With
    a `seed`, sample i uses seed + i, as vLLM does for `n > 1`: a sample is the same on whichever worker it is made.
    """

    run: int = Field(ge=0)
    prompt_index: int = Field(ge=0)
    prompt_token_ids: list[int] = Field(min_length=1)
    samples: list[tuple[int, int]] = Field(min_length=1)
    sampling_params: dict[str, Any]


class Failure(NamedTuple):
    """A sample that its engine refused: the request is at fault, not the worker."""

    key: SampleKey
    message: str


class Finished(NamedTuple):
    run: int
    sample: Sample


class WorkerInfo(_Model):
    """What a started worker is."""

    worker_id: int
    capacity: int = Field(ge=1, description="samples that the engine decodes at once (max_num_seqs)")
    max_model_len: int = Field(ge=1)
    pid: int
    engine_pids: list[int] = Field(description="processes started by the worker")
    base_weights: str | None = Field(description="folder of the checkpoint it was started from, None if not a folder")


class WorkerStats(_Model):
    """Counters of one worker since its engine started."""

    worker_id: int
    weight_version: int = 0
    running: int = 0
    waiting: int = 0
    running_tokens: int = Field(default=0, description="prompt tokens of the running samples")
    finished_samples: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafts: int = Field(default=0, description="verified drafts: one per request and step with draft length > 0")
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = Field(default_factory=list)
    drafted_per_position: list[int] = Field(default_factory=list)
    weight_updates: int = 0
    weight_update_seconds: float = 0.0
    engine_seconds: float = Field(default=0.0, description="time with at least one running sample")

    @property
    def acceptance(self) -> float | None:
        """Accepted per drafted token; None without drafts."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def steps(self) -> int:
        """Steps of requests, added up.

        Each yields one token and the accepted ones, but those accepted past a sample's end are not generated tokens:
        there the count is at least the drafts and the step of each prompt, which has none.
        """
        return max(self.generated_tokens - self.accepted_tokens, self.drafts + self.finished_samples)

    @property
    def mean_draft_length(self) -> float:
        """Mean γ per request and step, steps without drafts (γ = 0) included."""
        return self.draft_tokens / self.steps if self.steps else 0.0

    @property
    def acceptance_length(self) -> float:
        """Mean τ: tokens per request and step."""
        return self.generated_tokens / self.steps if self.steps else 1.0


class CollectReply(NamedTuple):
    """What a worker has finished since it was last asked, and its counters."""

    finished: list[Finished]
    failures: list[Failure]
    stats: WorkerStats


class WorkerReport(_Model):
    """One worker's part in a run."""

    worker_id: int
    samples: int
    generated_tokens: int
    busy_s: float = Field(description="time with at least one sample in flight")
    utilisation: float = Field(description="busy_s over the makespan")
    occupancy: float = Field(description="mean samples in flight over capacity, while the run lasted")
    idle_tail_s: float = Field(description="time between its last sample and the end of the run")
    draft_length: float = Field(description="mean γ per request and step")
    acceptance: float | None
    acceptance_length: float
    restarts: int
    weight_version: int


class PoolReport(_Model):
    """How one `generate` call went."""

    samples: int
    generated_tokens: int
    makespan_s: float
    tokens_per_s: float
    tail_s: float = Field(description="from the first worker that ran out of work to the end")
    tail_fraction: float
    moved_samples: int = Field(description="samples moved, before they began, from a busy worker to an idle one")
    regenerated_samples: int = Field(description="samples begun again after a worker was lost or weights changed")
    restarts: int
    workers: list[WorkerReport]


def explain(error: ValidationError) -> str:
    """One sentence naming the first invalid field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{field}: {first['msg']}"
