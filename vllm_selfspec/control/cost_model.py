"""How long a step takes: target, verify and draft forwards as functions of batch, context and draft length.

Two layers, both fitted to measured points:

1. A roofline (Williams et al. 2009; EfficientRollout, arXiv 2606.18967, section on the cost model). A forward of
   ``rows`` query rows for ``batch`` requests of ``seq`` context tokens takes
   ``max(weights + max(context·batch·seq, span·seq), row·rows + row_context·rows·seq) + request·batch`` seconds:
   reading weights and KV cache against computing, plus per-request overhead. ``span`` is the critical path of one
   sequence's attention, which no batching shortens.
2. A Gaussian process over the logarithm of measured / roofline, in log2(rows), log2(batch), log2(seq). It carries what
   no roofline knows (GEMM tiles, kernels that switch by row count, attention kernels for several query rows). Length
   scales and variances are chosen by marginal likelihood, so ten live points give a nearly pure roofline and a sweep of
   hundreds gives a surface. Outside the measured box the residual of the nearest edge is kept: the roofline's slope
   extrapolates, the GP does not.

Predictions are tabulated once, made non-decreasing in the batch size, and interpolated linearly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve
from scipy.optimize import least_squares, minimize

SCHEMA_VERSION = 1
Component = Literal["target", "verify", "draft", "prefill"]
Array = NDArray[np.float64]
_DECODING = ("target", "verify")

_BATCH_NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
_SEQ_NODES = (1, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
_DRAFT_NODES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 19, 23, 31, 63)


@dataclass(frozen=True)
class ModelConstants:
    """What is known of model and machine without measuring; every field may be None.

    weight_bytes, draft_weight_bytes: read by one target and one draft forward. flops_per_token: dense FLOP of one row.
    kv_bytes_per_token: KV cache bytes of one token. bandwidth (bytes/s) and flops (FLOP/s): peak rates of the machine.
    """

    weight_bytes: float | None = None
    draft_weight_bytes: float | None = None
    flops_per_token: float | None = None
    kv_bytes_per_token: float | None = None
    bandwidth: float | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Point:
    """One measurement: `seconds` of one forward of `component` at `batch` requests of `seq` context tokens.

    `num_draft_tokens` is what "verify" verifies, 0 for "target", and for "draft" the γ of the cycle that the draft
    forward was part of (engines pad draft batches by it). "prefill" computes the `seq` prompt tokens of each request in
    one step. `noise` is the relative standard error of `seconds`.
    """

    component: Component
    batch: int
    seq: int
    num_draft_tokens: int
    seconds: float
    noise: float = 0.01

    def __post_init__(self) -> None:
        if self.component not in get_args(Component):
            raise ValueError(
                f"component {self.component!r} of a point must be one of {', '.join(get_args(Component))}."
            )
        if self.batch < 1 or self.seq < 1 or self.num_draft_tokens < 0:
            raise ValueError(f"point {self} needs batch ≥ 1, seq ≥ 1 and num_draft_tokens ≥ 0.")
        if not (self.seconds > 0.0 and math.isfinite(self.seconds)):
            raise ValueError(f"seconds of point {self} must be a positive number.")


@dataclass(frozen=True)
class Roofline:
    """Parameters of one forward, all in seconds (see the module docstring)."""

    weights: float
    context: float
    span: float
    row: float
    row_context: float
    request: float

    def time(self, batch: Array, seq: Array, rows: Array) -> Array:
        """Seconds; the three arrays broadcast."""
        memory = self.weights + np.maximum(self.context * batch * seq, self.span * seq)
        compute = self.row * rows + self.row_context * rows * seq
        return np.asarray(np.maximum(memory, compute) + self.request * batch)


def _roofline_guess(points: Sequence[Point], constants: ModelConstants, draft: bool) -> Array:
    """Logarithms of the parameters to start from: physical where constants are known, else the data's scale."""
    seconds = np.array([p.seconds for p in points])
    rows = np.array([p.batch * (1 if draft else p.num_draft_tokens + 1) for p in points])
    least = float(seconds.min())
    weight_bytes = constants.draft_weight_bytes if draft else constants.weight_bytes
    known_bw, known_flops = constants.bandwidth, constants.flops
    weights = weight_bytes / (0.8 * known_bw) if weight_bytes and known_bw else least
    row = constants.flops_per_token / (0.7 * known_flops) if constants.flops_per_token and known_flops else None
    context = constants.kv_bytes_per_token / known_bw if constants.kv_bytes_per_token and known_bw else 1e-6 * least
    if row is None:
        row = 0.8 * float(seconds.max()) / float(rows.max())
    return np.log([weights, context, 1e-6 * least, row, 1e-7 * row, 1e-3 * least])


def _fit_roofline(points: Sequence[Point], rows: Array, constants: ModelConstants, draft: bool) -> Roofline:
    batch, seq, seconds = (np.array([getattr(p, name) for p in points], dtype=float) for name in _POINT_COLUMNS)
    fits = []
    # known constants can be far from what the machine reaches, so the scale of the data is a second start
    for known in {constants, ModelConstants()}:
        start = _roofline_guess(points, known, draft)

        def residuals(theta: Array, start: Array = start) -> Array:
            misfit = np.log(Roofline(*np.exp(theta)).time(batch, seq, rows) / seconds) / 0.05
            return np.concatenate([misfit, 0.1 * (theta - start)])

        fits.append(least_squares(residuals, start, loss="soft_l1"))
    fitted = min(fits, key=lambda fit: float(fit.cost)).x
    return Roofline(*(float(value) for value in np.exp(fitted)))


_POINT_COLUMNS = ("batch", "seq", "seconds")


def _matern32(a: Array, b: Array, scale: float) -> Array:
    distance = math.sqrt(3.0) * np.abs(a[:, None] - b[None, :]) / scale
    return np.asarray((1.0 + distance) * np.exp(-distance))


@dataclass(frozen=True)
class Kernel:
    """Covariance of the log residual. Scales in octaves, deviations in natural-log units.

    Three effects: of the rows alone (GEMM tiles; shared by target and verify), of rows × batch × context, and of
    batch × context (attention), plus a constant; the last three apart for one query row and for several.
    """

    rows_sd: float = 0.20
    joint_sd: float = 0.02
    context_sd: float = 0.02
    constant_sd: float = 0.10
    rows_scale: float = 1.0
    batch_scale: float = 3.0
    seq_scale: float = 3.0
    noise_sd: float = 0.02

    def covariance(self, left: Array, right: Array) -> Array:
        """[n, m] from features [n, 4], [m, 4]: log2 rows, log2 batch, log2 seq, 1 for several query rows else 0."""
        # exponential: step times jump where a GEMM starts another tile, and a smooth kernel would ring there
        by_rows = np.exp(-np.abs(left[:, None, 0] - right[None, :, 0]) / self.rows_scale)
        by_rows_wide = _matern32(left[:, 0], right[:, 0], self.batch_scale)
        by_batch = _matern32(left[:, 1], right[:, 1], self.batch_scale)
        by_seq = np.exp(-0.5 * ((left[:, None, 2] - right[None, :, 2]) / self.seq_scale) ** 2)
        same_kind = left[:, None, 3] == right[None, :, 3]
        joint = self.joint_sd**2 * by_rows_wide + self.context_sd**2
        return np.asarray(self.rows_sd**2 * by_rows + same_kind * (joint * by_batch * by_seq + self.constant_sd**2))


class _Residual:
    """Gaussian process over log(measured / roofline)."""

    def __init__(self, features: Array, targets: Array, variances: Array, kernel: Kernel | None) -> None:
        self.features, self.low, self.high = features, features.min(axis=0), features.max(axis=0)
        self.kernel = kernel if kernel is not None else self._choose_kernel(features, targets, variances)
        self.weights = np.linalg.solve(self._matrix(self.kernel, features, variances), targets)

    @staticmethod
    def _matrix(kernel: Kernel, features: Array, variances: Array) -> Array:
        return kernel.covariance(features, features) + np.diag(kernel.noise_sd**2 + variances)

    @classmethod
    def _choose_kernel(cls, features: Array, targets: Array, variances: Array) -> Kernel:
        start = np.log(list(asdict(Kernel()).values()))
        # log-normal priors: deviations within a factor e, scales within a factor √e of the defaults
        width = np.array([1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 1.0])

        def objective(theta: Array) -> float:
            matrix = cls._matrix(Kernel(*np.exp(theta)), features, variances)
            try:
                factor = np.linalg.cholesky(matrix)
            except np.linalg.LinAlgError:
                return 1e9
            fit = 0.5 * targets @ cho_solve((factor, True), targets) + np.log(np.diag(factor)).sum()
            return float(fit + 0.5 * (((theta - start) / width) ** 2).sum())

        best = minimize(objective, start, method="L-BFGS-B", options={"maxiter": 40}).x
        return Kernel(*(float(value) for value in np.exp(best)))

    def log_ratio(self, features: Array) -> Array:
        clamped = np.clip(features, self.low, self.high)
        return np.asarray(self.kernel.covariance(clamped, self.features) @ self.weights)


class _Forward:
    """One fitted forward: roofline times exp(residual)."""

    def __init__(
        self,
        points: Sequence[Point],
        constants: ModelConstants,
        *,
        draft: bool,
        padded: bool,
        roofline: Roofline | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        self.draft, self.padded = draft, padded
        batch = np.array([p.batch for p in points], dtype=float)
        seq = np.array([p.seq for p in points], dtype=float)
        drafts = np.array([p.num_draft_tokens for p in points], dtype=float)
        seconds = np.array([p.seconds for p in points])
        rows = self.rows(batch, drafts)
        self.roofline = roofline if roofline is not None else _fit_roofline(points, rows, constants, draft)
        targets = np.log(seconds / self.roofline.time(batch, seq, rows))
        variances = np.clip([p.noise**2 for p in points], 0.0, 0.02)
        self.residual = _Residual(self._features(batch, seq, drafts), targets, variances, kernel)

    def rows(self, batch: Array, drafts: Array) -> Array:
        """Query rows that one forward computes."""
        if not self.draft:
            return batch * (drafts + 1.0)
        return np.ceil(batch / (drafts + 1.0)) * (drafts + 1.0) if self.padded else batch + 0.0 * drafts

    def _features(self, batch: Array, seq: Array, drafts: Array) -> Array:
        several = np.zeros_like(batch) if self.draft else (drafts > 0).astype(float)
        return np.stack([np.log2(self.rows(batch, drafts)), np.log2(batch), np.log2(seq), several], axis=-1)

    def time(self, batch: Array, seq: Array, drafts: Array) -> Array:
        """Seconds for equally shaped flat arrays."""
        base = self.roofline.time(batch, seq, self.rows(batch, drafts))
        return np.asarray(base * np.exp(self.residual.log_ratio(self._features(batch, seq, drafts))))


def _non_decreasing(values: Array, axis: int) -> Array:
    """Halfway between the least non-decreasing majorant and the greatest minorant: dips and spikes share the blame."""
    upper = np.maximum.accumulate(values, axis=axis)
    lower = np.flip(np.minimum.accumulate(np.flip(values, axis=axis), axis=axis), axis=axis)
    return np.asarray(0.5 * (upper + lower))


class _Table:
    """A forward on a grid, non-decreasing along batch, with multilinear interpolation and edge clamping."""

    def __init__(self, forward: _Forward, points: Sequence[Point], drafts: Sequence[int]) -> None:
        self.axes = (
            np.array(sorted({*_BATCH_NODES, *(p.batch for p in points)}), dtype=float),
            np.array(sorted({*_SEQ_NODES, *(p.seq for p in points)}), dtype=float),
            np.array(sorted(drafts), dtype=float),
        )
        grid = np.meshgrid(*self.axes, indexing="ij")
        flat = forward.time(*(axis.ravel() for axis in grid))
        values = _non_decreasing(flat.reshape(grid[0].shape), axis=0)
        if not forward.draft:
            # one query row and several run different attention kernels, so γ = 0 stands apart
            values[:, :, 1:] = _non_decreasing(values[:, :, 1:], axis=2)
        self.values = values

    def __call__(self, batch: ArrayLike, seq: ArrayLike, drafts: ArrayLike) -> Array:
        low, fraction = [], []
        for axis, value in zip(self.axes, (batch, seq, drafts), strict=True):
            clamped = np.clip(np.asarray(value, dtype=float), axis[0], axis[-1])
            index = np.clip(np.searchsorted(axis, clamped, side="right") - 1, 0, max(0, len(axis) - 2))
            upper = np.minimum(index + 1, len(axis) - 1)
            gap = axis[upper] - axis[index]
            low.append((index, upper))
            fraction.append(np.where(gap > 0, (clamped - axis[index]) / np.where(gap > 0, gap, 1.0), 0.0))
        result: Array = np.zeros(np.broadcast_shapes(*(f.shape for f in fraction)))
        for corner in range(8):
            bits = [(corner >> axis) & 1 for axis in range(3)]
            weight = np.ones(())
            for bit, part in zip(bits, fraction, strict=True):
                weight = weight * (part if bit else 1.0 - part)
            result = result + weight * self.values[tuple(low[axis][bits[axis]] for axis in range(3))]
        return result


@dataclass(frozen=True)
class StepTimes:
    """Seconds at one batch and context, as plain floats: what a decision needs.

    verify[γ] for γ in 0..max (verify[0] is plain decoding), draft of one draft forward, per_row the compute cost of one
    more query row when nothing is memory-bound (the marginal cost of one prefill token).
    """

    verify: tuple[float, ...]
    draft: float
    per_row: float


def _scalar_or_array(value: Array) -> Any:
    return float(value) if value.ndim == 0 else value


class CostModel:
    """Seconds of target, verify and draft forwards. Build it with `fit`, `from_profile`, `from_dict` or `prior`.

    All methods take scalars (and return a float) or arrays (and return the broadcast array). Batch is the number of
    decoding requests (≥ 1), seq their mean context length in tokens, num_draft_tokens the γ that is verified per
    request.
    """

    def __init__(
        self,
        forward: _Forward,
        draft: _Forward,
        points: Sequence[Point],
        constants: ModelConstants,
        meta: Mapping[str, Any],
    ) -> None:
        self._forward, self._draft = forward, draft
        self.points, self.constants, self.meta = tuple(points), constants, dict(meta)
        decoding = [p for p in points if p.component in _DECODING]
        drafts = {*_DRAFT_NODES, *(p.num_draft_tokens for p in decoding)}
        self._forward_table = _Table(forward, decoding, sorted(drafts))
        # The largest measured prefill; without one, what a verified row costs, of which each has logits, too.
        prefill = max((p for p in points if p.component == "prefill"), key=lambda p: p.batch * p.seq, default=None)
        self._per_row = prefill.seconds / (prefill.batch * prefill.seq) if prefill else forward.roofline.row
        self._max_drafts = max(drafts)
        plain_drafts = sorted(drafts) if draft.padded else [0]
        self._draft_table = _Table(draft, [p for p in points if p.component == "draft"], plain_drafts)

    @classmethod
    def fit(
        cls,
        points: Iterable[Point],
        constants: ModelConstants | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        pad_drafts: bool | None = None,
    ) -> CostModel:
        """Fit to measured points.

        Args:
            points: at least one "target" (or "verify") point and one "draft" point.
            constants: starting values of the roofline; None starts from the scale of the data.
            meta: identity of model, machine, drafter and versions; stored in the profile.
            pad_drafts: whether the engine pads a draft batch to a multiple of γ + 1 rows (vLLM does where its CUDA
                graph sizes are multiples of γ + 1). None: whichever explains the draft points better.

        Raises:
            ValueError: a component has no point.
        """
        points = list(points)
        constants = constants or ModelConstants()
        target = [p for p in points if p.component in _DECODING]
        drafts = [p for p in points if p.component == "draft"]
        for name, group in (("target or verify", target), ("draft", drafts)):
            if not group:
                raise ValueError(f"the measured points hold no {name} time: measure both before fitting a cost model.")
        forward = _Forward(target, constants, draft=False, padded=False)
        draft = _fit_draft(drafts, constants, pad_drafts)
        return cls(forward, draft, points, constants, meta or {})

    @classmethod
    def prior(cls, *, draft_ratio: float = 0.6, seconds: float = 0.01) -> CostModel:
        """A model for an unknown machine: only its shape matters, online correction finds the scale.

        Rows are free up to some tens and then cost time in proportion; a draft forward takes `draft_ratio` of a target
        forward of `seconds`.
        """
        points = [
            Point(
                "verify" if drafts else "target", batch, 512, drafts, seconds * (1.0 + batch * (drafts + 1) / 64.0), 0.3
            )
            for batch in (1, 8, 64)
            for drafts in (0, 3)
        ]
        points += [
            Point("draft", batch, 512, 0, draft_ratio * seconds * (1.0 + batch / 64.0), 0.3) for batch in (1, 8, 64)
        ]
        return cls.fit(points, meta={"source": "prior"}, pad_drafts=False)

    @property
    def is_prior(self) -> bool:
        """True when nothing was measured."""
        return self.meta.get("source") == "prior"

    @property
    def target_roofline(self) -> Roofline:
        """The fitted roofline of target and verify forwards, without residuals."""
        return self._forward.roofline

    @property
    def draft_roofline(self) -> Roofline:
        """The fitted roofline of draft forwards, without residuals."""
        return self._draft.roofline

    def target_time(self, batch: ArrayLike, seq: ArrayLike) -> Any:
        """T_T: one plain decoding step."""
        return _scalar_or_array(self._forward_table(batch, seq, 0))

    def draft_time(self, batch: ArrayLike, seq: ArrayLike, num_draft_tokens: ArrayLike | None = None) -> Any:
        """T_D: one draft forward; `num_draft_tokens` matters only where the engine pads drafts by it."""
        return _scalar_or_array(self._draft_table(batch, seq, 0 if num_draft_tokens is None else num_draft_tokens))

    def verify_time(self, batch: ArrayLike, seq: ArrayLike, num_draft_tokens: ArrayLike) -> Any:
        """T_V: the target forward over num_draft_tokens + 1 rows per request. With 0 it is `target_time`."""
        return _scalar_or_array(self._forward_table(batch, seq, num_draft_tokens))

    def prefill_time(self, tokens: ArrayLike) -> Any:
        """Marginal seconds of `tokens` prefill rows in a step that is already compute-bound (no weight read)."""
        return _scalar_or_array(self._per_row * np.asarray(tokens, dtype=float))

    def cycle_time(self, batch: ArrayLike, seq: ArrayLike, num_draft_tokens: ArrayLike) -> Any:
        """γ·T_D + T_V(γ): seconds of one cycle of γ drafts."""
        drafts = np.asarray(num_draft_tokens, dtype=float)
        draft = np.asarray(self.draft_time(batch, seq, drafts))
        return _scalar_or_array(drafts * draft + np.asarray(self.verify_time(batch, seq, drafts)))

    def speedup(
        self, batch: ArrayLike, seq: ArrayLike, num_draft_tokens: ArrayLike, acceptance_length: ArrayLike
    ) -> Any:
        """τ·T_T / (γ·T_D + T_V): above 1 drafting is faster. `acceptance_length` τ counts the target's own token."""
        tau = np.asarray(acceptance_length, dtype=float)
        plain = np.asarray(self.target_time(batch, seq))
        return _scalar_or_array(tau * plain / np.asarray(self.cycle_time(batch, seq, num_draft_tokens)))

    def step_times(self, batch: float, seq: float, max_draft_tokens: int) -> StepTimes:
        """All times of one operating point, for γ in 0..max_draft_tokens, as plain floats."""
        drafts = np.arange(max_draft_tokens + 1)
        verify = self._forward_table(batch, seq, drafts)
        return StepTimes(
            verify=tuple(verify.tolist()),
            draft=float(self._draft_table(batch, seq, 0)),
            per_row=self._per_row,
        )

    def to_dict(self) -> dict[str, Any]:
        """The whole profile as plain JSON types, measured points included."""
        return {
            "schema_version": SCHEMA_VERSION,
            "meta": self.meta,
            "constants": asdict(self.constants),
            "model": {
                "forward": {
                    "roofline": asdict(self._forward.roofline),
                    "residual": asdict(self._forward.residual.kernel),
                },
                "draft": {
                    "padded_to_cycle": self._draft.padded,
                    "roofline": asdict(self._draft.roofline),
                    "residual": asdict(self._draft.residual.kernel),
                },
            },
            "points": {
                "columns": ["component", "batch", "seq", "num_draft_tokens", "seconds", "noise"],
                "rows": [
                    [
                        p.component,
                        p.batch,
                        p.seq,
                        p.num_draft_tokens,
                        p.seconds,
                        p.noise,
                    ]
                    for p in self.points
                ],
            },
        }

    @classmethod
    def from_dict(cls, profile: Mapping[str, Any]) -> CostModel:
        """Rebuild from `to_dict`'s form. ValueError: a field is missing or the schema version differs."""
        version = profile.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version of the profile is {version!r}, this version reads {SCHEMA_VERSION}: calibrate again."
            )
        try:
            columns = profile["points"]["columns"]
            points = [Point(**dict(zip(columns, row, strict=True))) for row in profile["points"]["rows"]]
            constants = ModelConstants(**profile["constants"])
            forward_part, draft_part = profile["model"]["forward"], profile["model"]["draft"]
            forward = _Forward(
                [p for p in points if p.component in _DECODING],
                constants,
                draft=False,
                padded=False,
                roofline=Roofline(**forward_part["roofline"]),
                kernel=Kernel(**forward_part["residual"]),
            )
            draft = _Forward(
                [p for p in points if p.component == "draft"],
                constants,
                draft=True,
                padded=bool(draft_part["padded_to_cycle"]),
                roofline=Roofline(**draft_part["roofline"]),
                kernel=Kernel(**draft_part["residual"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the profile is not one of ours ({error}): calibrate again.") from error
        return cls(forward, draft, points, constants, profile["meta"])

    @classmethod
    def from_profile(cls, path: str | Path) -> CostModel:
        """Read a profile file. Raises ValueError naming the file when it cannot be used."""
        try:
            profile = json.loads(Path(path).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"control.profile {path} cannot be read ({error}): give a profile file or 'auto'."
            ) from error
        try:
            return cls.from_dict(profile)
        except ValueError as error:
            raise ValueError(f"control.profile {path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the profile as readable JSON, one measured point a line."""
        profile = self.to_dict()
        rows = profile["points"].pop("rows")
        text = json.dumps(profile, indent=2)
        lines = ",\n".join("      " + json.dumps(row) for row in rows)
        # `points` is the last object, so its closing brackets are the text's last two lines
        head = text[: text.rindex("]") + 1]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(f'{head},\n    "rows": [\n{lines}\n    ]\n  }}\n}}\n')


def _fit_draft(points: Sequence[Point], constants: ModelConstants, pad_drafts: bool | None) -> _Forward:
    if pad_drafts is not None:
        return _Forward(points, constants, draft=True, padded=pad_drafts)
    if len({p.num_draft_tokens for p in points}) < 2:
        return _Forward(points, constants, draft=True, padded=False)
    plain, padded = (
        _unexplained(_Forward(points, constants, draft=True, padded=choice, kernel=Kernel()), points)
        for choice in (False, True)
    )
    return _Forward(points, constants, draft=True, padded=padded < 0.9 * plain)


def _unexplained(forward: _Forward, points: Sequence[Point]) -> float:
    columns = np.array([[p.batch, p.seq, p.num_draft_tokens, p.seconds] for p in points], dtype=float).T
    return float(np.abs(np.log(forward.time(*columns[:3]) / columns[3])).mean())


@dataclass(frozen=True)
class ProfileIdentity:
    """What a profile must agree with before it is used; None fields are not compared."""

    model: str | None = None
    hardware: str | None = None
    drafter: str | None = None
    versions: Mapping[str, str] | None = field(default=None)


def check_profile(meta: Mapping[str, Any], expected: ProfileIdentity | Mapping[str, Any]) -> None:
    """Refuse a profile of another model, machine or drafter.

    Raises:
        ValueError: one sentence naming the field that differs, both values and the mend.
    """
    wanted = asdict(expected) if isinstance(expected, ProfileIdentity) else dict(expected)
    for name in ("model", "hardware", "drafter", "versions"):
        if wanted.get(name) is not None and meta.get(name) != wanted[name]:
            raise ValueError(
                f"control.profile was measured for {name} {meta.get(name)!r}, this engine has {wanted[name]!r}: "
                "use profile 'auto' or calibrate again."
            )
