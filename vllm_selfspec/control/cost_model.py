"""How long a step takes: target, verify and draft forwards as functions of batch, context and draft length.

Three layers, all fitted to measured points:

1. A roofline (Williams et al. 2009), apart for linear layers and attention, because a forward runs one after the other
   (EfficientRollout, arXiv 2606.18967, takes one maximum over both). ``rows`` query rows for ``batch`` requests of
   ``seq`` context tokens take ``max(weights, row·rows) + unhidden·row·rows + request·batch`` plus
   ``max(context·batch, span, row_context·rows)·seq`` seconds: reading weights against computing, the part of computing
   that reading does not hide, overhead per request; reading the KV cache against one sequence's critical path, which
   no batching shortens (``span_rows`` times as long with several query rows), against computing.
2. Tiles. A GEMM takes as long as the next multiple of its tile's rows. Several sizes are averaged, weighted
   by how well they interpolate the data.
3. A Gaussian process over the logarithm of measured / roofline, in log2(rows), log2(batch), log2(seq). It carries what
   no roofline knows (kernels that switch by row count, attention kernels for several query rows). Length scales and
   variances are chosen by marginal likelihood, so ten live points give a nearly pure roofline and a sweep of hundreds
   gives a surface. Its noise is Student-t: a point that contradicts all its neighbours is not followed. Outside the
   measured box the residual of the nearest edge is kept: the roofline's slope extrapolates, the GP does not.

Predictions are tabulated once, made non-decreasing in the batch size, and interpolated linearly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve
from scipy.optimize import least_squares, minimize

SCHEMA_VERSION = 2
Component = Literal["target", "verify", "draft", "light", "prefill"]
Array = NDArray[np.float64]
_DECODING = ("target", "verify")
_PROMPT_NOISE = 0.15
"""How far a prompt's step may be off as one of a verification: its attention differs, and it has fewer logits."""

_BATCH_NODES = (
    *(1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128),
    *(160, 192, 256, 384, 512, 768, 1024, 2048, 4096),
)
_SEQ_NODES = (1, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
# rows of a GEMM's output tile, and how fast a tile that interpolates worse loses its share
_TILES = (16, 32, 64, 128, 256)
_SHARPNESS = 8.0
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
    forward was part of (engines pad draft batches by it). "light" is a draft forward of the drafter's light view, where
    it has two. "prefill" computes the `seq` prompt tokens of each request in one step. `noise` is the relative standard
    error of `seconds`.
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
    """Parameters of one forward (see the module docstring); seconds, but for the ratios `span_rows` and `unhidden`."""

    weights: float
    context: float
    span: float
    span_rows: float
    row: float
    row_context: float
    request: float
    unhidden: float

    def parts(self, batch: Array, seq: Array, rows: Array, several: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Seconds of linear layers and of attention; the arrays broadcast. `several`: more than one row a request."""
        compute = self.row * rows
        linear = np.maximum(self.weights, compute) + self.unhidden * compute + self.request * batch
        span = self.span * np.where(several, self.span_rows, 1.0)
        attention = np.maximum(np.maximum(self.context * batch, span), self.row_context * rows) * seq
        return np.asarray(linear), np.asarray(attention)

    def time(self, batch: Array, seq: Array, rows: Array) -> Array:
        """Seconds; the three arrays broadcast."""
        linear, attention = self.parts(batch, seq, rows, np.asarray(rows > batch))
        return linear + attention


def _roofline_guess(points: Sequence[Point], constants: ModelConstants, draft: bool) -> Array:
    """Logarithms of the parameters to expect: physical where constants are known, else the data's scale."""
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
    return np.log([weights, context, 1e-6 * least, 1.0, row, 1e-7 * row, 1e-3 * least, 0.1])


def _fit_roofline(
    points: Sequence[Point],
    rows: Array,
    several: NDArray[np.bool_],
    constants: ModelConstants,
    draft: bool,
    near: Roofline | None,
) -> Roofline:
    batch, seq, seconds = (np.array([getattr(p, name) for p in points], dtype=float) for name in _POINT_COLUMNS)

    def misfit(theta: Array) -> Array:
        linear, attention = Roofline(*np.exp(theta)).parts(batch, seq, rows, several)
        return np.log((linear + attention) / seconds)

    # Contexts that hardly differ, as those of a live calibration, do not tell what a token of context costs: whatever
    # the fit puts there would be multiplied by contexts twenty times as long. It stays where it is expected.
    told = seq.max() >= 2.0 * seq.min()
    pull = np.full(8, 0.1)
    if not told:
        pull[[1, 2, 5]] = 10.0
    # What is left of a point can be of the scale of its own noise.
    noise = np.array([p.noise for p in points])

    def residuals(theta: Array, scale: float, expected: Array) -> Array:
        return np.concatenate([misfit(theta) / np.maximum(scale, noise), pull * (theta - expected)])

    def refined(rough: Array, expected: Array) -> tuple[float, Array]:
        # a loss that forgets outliers, at the scale of what is left
        scale = float(np.clip(1.4826 * np.median(np.abs(misfit(rough))), 0.01, 0.05))
        theta = least_squares(residuals, rough, loss="cauchy", args=(scale, expected)).x
        return float((np.abs(misfit(theta)) / np.maximum(0.01, noise)).mean()), theta

    def soft(start: Array, expected: Array, **limits: int) -> Any:
        return least_squares(residuals, start, loss="soft_l1", args=(0.05, expected), **limits)

    if near is not None:
        theta = refined(np.log(list(asdict(near).values())), _roofline_guess(points, constants, draft))[1]
        return Roofline(*(float(value) for value in np.exp(theta)))
    usual, others = [], []
    # known constants can be far from what the machine reaches, so the scale of the data is a second start
    for known in {constants, ModelConstants()}:
        expected = _roofline_guess(points, known, draft)
        start = expected.copy()
        if told:
            # a side of a maximum that is far below the other has no gradient: start where each takes a tenth
            start[[2, 5]] = np.log(0.1 * seconds.min() / seq.max() / np.array([1.0, rows.max()]))
        usual.append(refined(soft(start, expected).x, expected))
        if told:
            # the same with each side of attention on top, and a cost of rows that long contexts do not blur
            far, short = np.argmax(batch * seq), seq < 2.0 * seq.min()
            each = seconds[far] / seq[far] / np.array([batch[far], 1.0, rows[far]])
            start[4] = math.log(0.8 * seconds[short].max() / rows[short].max())
            tried = []
            for shares in ((0.5, 0.1, 0.1), (0.1, 0.5, 0.1), (0.1, 0.1, 0.5), (0.5, 0.1, 0.5)):
                start[[1, 2, 5]] = np.log(np.array(shares) * each)
                tried.append(soft(start.copy(), expected, max_nfev=6))  # enough to see which leads somewhere
            best = sorted(tried, key=lambda fit: float(fit.cost))[:2]
            others += [refined(soft(fit.x, expected).x, expected) for fit in best]
    # The usual start has the fewest assumptions: another one has to explain clearly more.
    fitted = min([*usual, *((1.25 * error, theta) for error, theta in others)], key=lambda fit: fit[0])[1]
    return Roofline(*(float(value) for value in np.exp(fitted)))


_POINT_COLUMNS = ("batch", "seq", "seconds")
# columns of the Gaussian process' features: logarithms to base 2 but for the last two
_TILED, _ROWS, _BATCH, _SEQ, _SEVERAL, _ATTENTION = range(6)


@dataclass(frozen=True)
class Kernel:
    """Covariance of log(measured / roofline). Scales in octaves, deviations in natural-log units.

    Five effects: of the tiled rows and of the rows themselves on the linear layers (shared by target and verify), of
    batch × context on attention, of rows × batch × context on everything, and a constant; the last three apart for one
    query row and for several. The first two count by the linear layers' share of the roofline, the third by that of
    attention:     they run one after the other, so what one deviates must not multiply the other.
    """

    rows_sd: float = 0.10
    fine_sd: float = 0.03
    joint_sd: float = 0.02
    context_sd: float = 0.10
    constant_sd: float = 0.10
    rows_scale: float = 1.0
    batch_scale: float = 3.0
    seq_scale: float = 3.0
    noise_sd: float = 0.01

    def covariance(self, left: Array, right: Array) -> Array:
        """[n, m] from features [n, 6], [m, 6]."""
        return self._with_gradient(left, right)[0]

    def covariance_and_gradient(self, features: Array) -> tuple[Array, list[Array]]:
        """[n, n] among the features, and its derivatives by the logarithms of all fields but `noise_sd`, in order."""
        covariance, gradient = self._with_gradient(features, features)
        return covariance, gradient()

    def _with_gradient(self, left: Array, right: Array) -> tuple[Array, Callable[[], list[Array]]]:
        def factor(column: int, of: Callable[[Array], Array]) -> Array:
            # [n, m] of the distances along one feature, which takes few values
            values, where = np.unique(left[:, column], return_inverse=True)
            return of(np.abs(values[:, None] - right[None, :, column]))[where]

        def share(of_left: Array, of_right: Array) -> Array:
            return np.asarray(of_left[:, None] * of_right[None, :])

        def matern(distance: Array) -> Array:
            scaled = math.sqrt(3.0) * distance / self.batch_scale
            return np.asarray((1.0 + scaled) * np.exp(-scaled))

        def matern_slope(distance: Array) -> Array:  # by the logarithm of the scale
            scaled = math.sqrt(3.0) * distance / self.batch_scale
            return np.asarray(scaled**2 * np.exp(-scaled))

        of_linear = share(1.0 - left[:, _ATTENTION], 1.0 - right[:, _ATTENTION])
        of_attention = share(left[:, _ATTENTION], right[:, _ATTENTION])
        same_kind = factor(_SEVERAL, lambda distance: (distance == 0.0).astype(float))
        # exponential: step times jump where a GEMM starts another tile, and a smooth kernel would ring there
        by_tiles = of_linear * factor(_TILED, lambda distance: self.rows_sd**2 * np.exp(-distance / self.rows_scale))
        by_rows = of_linear * factor(_ROWS, lambda distance: self.fine_sd**2 * np.exp(-distance))
        wide, by_batch = factor(_ROWS, matern), factor(_BATCH, matern)
        by_seq = same_kind * factor(_SEQ, lambda distance: np.exp(-0.5 * (distance / self.seq_scale) ** 2))
        joint = self.joint_sd**2 * wide * by_batch * by_seq
        context = self.context_sd**2 * of_attention * by_batch * by_seq
        constant = self.constant_sd**2 * same_kind

        def gradient() -> list[Array]:
            batch_slope = factor(_BATCH, matern_slope)
            by_scale = self.joint_sd**2 * (factor(_ROWS, matern_slope) * by_batch + wide * batch_slope)
            by_scale = (by_scale + self.context_sd**2 * of_attention * batch_slope) * by_seq
            tiles = factor(_TILED, lambda distance: distance / self.rows_scale)
            contexts = factor(_SEQ, lambda distance: (distance / self.seq_scale) ** 2)
            deviations = [2.0 * term for term in (by_tiles, by_rows, joint, context, constant)]
            return [*deviations, by_tiles * tiles, by_scale, (joint + context) * contexts]

        return np.asarray(by_tiles + by_rows + joint + context + constant), gradient


class _Residual:
    """Gaussian process over log(measured / roofline), with Student-t noise."""

    _FREEDOM = 2.0
    _FIRST_NOISE = 0.05

    def __init__(self, features: Array, targets: Array, variances: Array, kernel: Kernel | None) -> None:
        self.features, self.low, self.high = features, features.min(axis=0), features.max(axis=0)
        self.kernel = kernel if kernel is not None else self._choose_kernel(features, targets, variances)
        covariance = self.kernel.covariance(features, features)
        base = self.kernel.noise_sd**2 + variances
        noise = self._noise(covariance, targets, base)
        self.trust = base / noise
        self.precision = np.linalg.inv(covariance + np.diag(noise))
        self.weights = self.precision @ targets
        # outliers count little here, too
        self.unexplained = float(np.log1p(((covariance @ self.weights - targets) / 0.03) ** 2).mean())

    @classmethod
    def _noise(cls, covariance: Array, targets: Array, variances: Array) -> Array:
        """Noise variances [n] under which points far from what all others say count little.

        Student-t noise as a scale mixture (Geweke 1993), each point judged by its leave-one-out prediction: an
        interpolating process agrees with every point that it has seen. The first round trusts nobody more than 5 %.
        """
        noise = variances + cls._FIRST_NOISE**2
        for _ in range(10):
            precision = np.linalg.inv(covariance + np.diag(noise))
            spread = 1.0 / np.diag(precision)
            error = (precision @ targets) * spread
            expected = np.maximum(spread - noise, 0.0) + variances
            trust = (cls._FREEDOM + 1.0) / (cls._FREEDOM + error**2 / expected)
            noise = variances / np.minimum(trust, 1.0)
        return noise

    @classmethod
    def _choose_kernel(cls, features: Array, targets: Array, variances: Array) -> Kernel:
        """Most likely kernel, twice in turn with the noise of single points."""
        start = np.log(list(asdict(Kernel()).values()))
        # log-normal priors: deviations within a factor e, scales within a factor √e of the defaults
        width = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 1.0])
        theta = start
        for _ in range(2):
            kernel = Kernel(*np.exp(theta))
            base = kernel.noise_sd**2 + variances
            distrust = cls._noise(kernel.covariance(features, features), targets, base) / base

            def objective(theta: Array, distrust: Array = distrust) -> tuple[float, Array]:
                kernel = Kernel(*np.exp(theta))
                covariance, gradient = kernel.covariance_and_gradient(features)
                covariance += np.diag((kernel.noise_sd**2 + variances) * distrust)
                try:
                    factor = np.linalg.cholesky(covariance)
                except np.linalg.LinAlgError:
                    return 1e9, np.zeros_like(theta)
                precision = cho_solve((factor, True), np.eye(len(targets)))
                weights = precision @ targets
                slack = precision - np.outer(weights, weights)
                slopes = [0.5 * float((slack * part).sum()) for part in gradient]
                slopes.append(float((np.diag(slack) * kernel.noise_sd**2 * distrust).sum()))
                fit = 0.5 * targets @ weights + np.log(np.diag(factor)).sum()
                pull = (theta - start) / width
                return float(fit + 0.5 * (pull**2).sum()), np.array(slopes) + pull / width

            theta = minimize(objective, theta, jac=True, method="L-BFGS-B", options={"maxiter": 40}).x
        return Kernel(*(float(value) for value in np.exp(theta)))

    def interpolation_error(self, trust: Array) -> float:
        """Mean |error| at row counts, and at batch sizes, that are left out, by `trust`: their geometric mean."""
        means = []
        for column in (_ROWS, _BATCH):
            errors = np.empty(len(self.weights))
            for value in np.unique(self.features[:, column]):
                group = np.flatnonzero(self.features[:, column] == value)
                errors[group] = np.linalg.solve(self.precision[np.ix_(group, group)], self.weights[group])
            means.append(float(np.average(np.abs(errors), weights=trust)))
        return math.sqrt(means[0] * means[1])

    def log_ratio(self, features: Array) -> Array:
        clamped = np.clip(features, self.low, self.high)
        clamped[:, _ATTENTION] = features[:, _ATTENTION]
        # in blocks, for the covariances of a whole table would fill the memory
        blocks = np.array_split(clamped, len(clamped) // 2048 + 1)
        return np.concatenate([self.kernel.covariance(block, self.features) @ self.weights for block in blocks])


def _tiled(rows: Array, tile: int) -> Array:
    """Rows rounded up to what a GEMM computes: whole tiles, below one tile a power of two."""
    if tile == 1:
        return rows
    # the tolerance forgives rows that come from their logarithm
    size = np.minimum(tile, 2.0 ** np.ceil(np.log2(rows) - 1e-9))
    return np.asarray(np.ceil(rows / size - 1e-9) * size)


class _Surface:
    """Roofline times exp(residual), for one tile.

    `padded`: drafts run over a multiple of γ + 1 rows. `tile`: linear layers take as long as the next multiple of so
    many rows (below one tile the next power of two); 1 where there are no tiles.
    """

    def __init__(
        self,
        points: Sequence[Point],
        constants: ModelConstants,
        *,
        draft: bool,
        padded: bool,
        tile: int,
        roofline: Roofline | None = None,
        near: Roofline | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        """Fit what is None; `near` is a roofline to start from."""
        self.draft, self.padded, self.tile = draft, padded, tile
        batch = np.array([p.batch for p in points], dtype=float)
        seq = np.array([p.seq for p in points], dtype=float)
        drafts = np.array([p.num_draft_tokens for p in points], dtype=float)
        seconds = np.array([p.seconds for p in points])
        tiled, several = _tiled(self.rows(batch, drafts), self.tile), self._several(drafts)
        self.roofline = roofline or _fit_roofline(points, tiled, several, constants, draft, near)
        base, features = self._base(batch, seq, drafts)
        variances = np.clip([p.noise**2 for p in points], 0.0, 0.02)
        self.residual = _Residual(features, np.log(seconds / base), variances, kernel)

    def rows(self, batch: Array, drafts: Array) -> Array:
        """Query rows that one forward computes."""
        if not self.draft:
            return batch * (drafts + 1.0)
        return np.ceil(batch / (drafts + 1.0)) * (drafts + 1.0) if self.padded else batch + 0.0 * drafts

    def tells(self, tile: int) -> bool:
        """Whether the fitted points know of this tile: not where all row counts are powers of two."""
        rows = 2.0 ** self.residual.features[:, _ROWS]
        return not np.allclose(_tiled(rows, tile), rows)

    def _several(self, drafts: Array) -> NDArray[np.bool_]:
        return np.zeros(drafts.shape, dtype=bool) if self.draft else np.asarray(drafts > 0)

    def _base(self, batch: Array, seq: Array, drafts: Array) -> tuple[Array, Array]:
        """Roofline seconds [n] and features [n, 6]."""
        rows, several = self.rows(batch, drafts), self._several(drafts)
        tiled = _tiled(rows, self.tile)
        linear, attention = self.roofline.parts(batch, seq, tiled, several)
        base = linear + attention
        features = [np.log2(tiled), np.log2(rows), np.log2(batch), np.log2(seq), several, attention / base]
        return base, np.stack(features, axis=-1).astype(float)

    def time(self, batch: Array, seq: Array, drafts: Array) -> Array:
        """Seconds for equally shaped flat arrays."""
        base, features = self._base(batch, seq, drafts)
        return np.asarray(base * np.exp(self.residual.log_ratio(features)))


class _Forward:
    """One fitted forward: the geometric mean of surfaces that differ in their tile, weighted by `shares`."""

    def __init__(self, surfaces: Sequence[_Surface], shares: Sequence[float]) -> None:
        self.surfaces, self.shares = tuple(surfaces), tuple(shares)
        self.draft, self.padded = surfaces[0].draft, surfaces[0].padded

    @classmethod
    def fit(
        cls, points: Sequence[Point], constants: ModelConstants, *, draft: bool, paddings: Sequence[bool] = (False,)
    ) -> _Forward:
        """Choose the padding that explains the points, and the tiles that interpolate them best.

        How much a padding or a tile explains is judged with the default kernel. Several tiles are kept where they
        interpolate about equally well: choosing one would be up to chance.
        """

        def surface(padded: bool, tile: int, **known: Any) -> _Surface:
            return _Surface(points, constants, draft=draft, padded=padded, tile=tile, **known)

        first, *others = (surface(padded, 1, kernel=Kernel()) for padded in paddings)
        for other in others:
            if other.residual.unexplained < 0.9 * first.residual.unexplained:
                first = other
        most_rows = max(p.batch * (1 if draft else p.num_draft_tokens + 1) for p in points)
        all_tiles = [first]
        for tile in _TILES:
            if tile <= most_rows and first.tells(tile):
                all_tiles.append(surface(first.padded, tile, near=first.roofline, kernel=Kernel()))
        errors = np.array([1e-6 + one.residual.interpolation_error(first.residual.trust) for one in all_tiles])
        likely = (errors / errors.min()) ** -_SHARPNESS
        kept = [index for index in np.argsort(-likely.round(6), kind="stable")[:3] if likely[index] > 0.1]
        best = all_tiles[kept[0]]
        lead = surface(best.padded, best.tile, roofline=best.roofline)
        kernel = lead.residual.kernel
        more = [
            surface(best.padded, all_tiles[i].tile, roofline=all_tiles[i].roofline, kernel=kernel) for i in kept[1:]
        ]
        return cls([lead, *more], (likely[kept] / likely[kept].sum()).tolist())

    @property
    def roofline(self) -> Roofline:
        """That of the surface with the largest share."""
        return self.surfaces[0].roofline

    def time(self, batch: Array, seq: Array, drafts: Array) -> Array:
        """Seconds for equally shaped flat arrays."""
        logs = [
            share * np.log(one.time(batch, seq, drafts)) for share, one in zip(self.shares, self.surfaces, strict=True)
        ]
        return np.asarray(np.exp(np.sum(logs, axis=0)))

    def to_dict(self) -> dict[str, Any]:
        """What the points do not hold."""
        tiles = [
            {"tile": one.tile, "share": share, "roofline": asdict(one.roofline)}
            for one, share in zip(self.surfaces, self.shares, strict=True)
        ]
        return {"padded_to_cycle": self.padded, "residual": asdict(self.surfaces[0].residual.kernel), "tiles": tiles}

    @classmethod
    def from_dict(
        cls, part: Mapping[str, Any], points: Sequence[Point], constants: ModelConstants, *, draft: bool
    ) -> _Forward:
        """Rebuild from `to_dict`'s form and the points that it was fitted to."""
        surfaces = [
            _Surface(
                points,
                constants,
                draft=draft,
                padded=bool(part["padded_to_cycle"]),
                tile=int(one["tile"]),
                roofline=Roofline(**one["roofline"]),
                kernel=Kernel(**part["residual"]),
            )
            for one in part["tiles"]
        ]
        return cls(surfaces, [float(one["share"]) for one in part["tiles"]])


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
    more query row when nothing is memory-bound (the marginal cost of one prefill token), light of one draft forward of
    the light view (that of draft where there is no such view).
    """

    verify: tuple[float, ...]
    draft: float
    per_row: float
    light: float

    def of_draft(self, light: bool) -> float:
        """Seconds of one draft forward of either view."""
        return self.light if light else self.draft


def _scalar_or_array(value: Array) -> Any:
    return float(value) if value.ndim == 0 else value


def _beyond(target: Sequence[Point], points: Sequence[Point]) -> list[Point]:
    """Prompts of more rows than were decoded or verified at once, as loose points of a verification of so many.

    Where all that was measured is bound by memory, nothing else says what a row costs beyond it.
    """
    most = max(p.batch * (p.num_draft_tokens + 1) for p in target)
    return [
        Point("verify", p.batch, p.seq, p.seq - 1, p.seconds, _PROMPT_NOISE)
        for p in points
        if p.component == "prefill" and p.batch * p.seq > most
    ]


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
        light: _Forward | None,
        points: Sequence[Point],
        constants: ModelConstants,
        meta: Mapping[str, Any],
    ) -> None:
        self._forward, self._draft, self._light = forward, draft, light
        self.points, self.constants, self.meta = tuple(points), constants, dict(meta)
        decoding = [p for p in points if p.component in _DECODING]
        drafts = {*_DRAFT_NODES, *(p.num_draft_tokens for p in decoding)}
        self._forward_table = _Table(forward, decoding, sorted(drafts))
        # The largest measured prefill; without one, what a verified row costs, of which each has logits, too.
        prefill = max((p for p in points if p.component == "prefill"), key=lambda p: p.batch * p.seq, default=None)
        self._per_row = (
            prefill.seconds / (prefill.batch * prefill.seq) if prefill else _compute_seconds(forward, decoding)
        )
        self._max_drafts = max(drafts)

        def drafting(component: Component, fitted: _Forward) -> _Table:
            plain_drafts = sorted(drafts) if fitted.padded else [0]
            return _Table(fitted, [p for p in points if p.component == component], plain_drafts)

        self._draft_table = drafting("draft", draft)
        self._light_table = self._draft_table if light is None else drafting("light", light)

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
        forward = _Forward.fit(target + _beyond(target, points), constants, draft=False)
        if pad_drafts is None:
            paddings = [False, True] if len({p.num_draft_tokens for p in drafts}) > 1 else [False]
        else:
            paddings = [pad_drafts]
        draft = _Forward.fit(drafts, constants, draft=True, paddings=paddings)
        lights = [p for p in points if p.component == "light"]
        light = _Forward.fit(lights, constants, draft=True, paddings=[draft.padded]) if lights else None
        return cls(forward, draft, light, points, constants, meta or {})

    @classmethod
    def prior(cls, *, draft_ratio: float = 0.6, light_ratio: float = 0.45, seconds: float = 0.01) -> CostModel:
        """A model for an unknown machine: only its shape matters, online correction finds the scale.

        Rows are free up to some tens and then cost time in proportion; a draft forward takes `draft_ratio` of a target
        forward of `seconds`, or `light_ratio` with the light view.
        """
        points = [
            Point(
                "verify" if drafts else "target", batch, 512, drafts, seconds * (1.0 + batch * (drafts + 1) / 64.0), 0.3
            )
            for batch in (1, 8, 64)
            for drafts in (0, 3)
        ]
        ratios: list[tuple[Component, float]] = [("draft", draft_ratio), ("light", light_ratio)]
        points += [
            Point(component, batch, 512, 0, ratio * seconds * (1.0 + batch / 64.0), 0.3)
            for component, ratio in ratios
            for batch in (1, 8, 64)
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

    @property
    def has_light_view(self) -> bool:
        """True when draft forwards of a light view were measured."""
        return self._light is not None

    def target_time(self, batch: ArrayLike, seq: ArrayLike) -> Any:
        """T_T: one plain decoding step."""
        return _scalar_or_array(self._forward_table(batch, seq, 0))

    def draft_time(self, batch: ArrayLike, seq: ArrayLike, num_draft_tokens: ArrayLike | None = None) -> Any:
        """T_D: one draft forward; `num_draft_tokens` matters only where the engine pads drafts by it."""
        return _scalar_or_array(self._draft_table(batch, seq, 0 if num_draft_tokens is None else num_draft_tokens))

    def light_time(self, batch: ArrayLike, seq: ArrayLike, num_draft_tokens: ArrayLike | None = None) -> Any:
        """The same of the light view; `draft_time` where there is none."""
        return _scalar_or_array(self._light_table(batch, seq, 0 if num_draft_tokens is None else num_draft_tokens))

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
            light=float(self._light_table(batch, seq, 0)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The whole profile as plain JSON types, measured points included."""
        return {
            "schema_version": SCHEMA_VERSION,
            "meta": self.meta,
            "constants": asdict(self.constants),
            "model": {
                name: part.to_dict()
                for name, part in (("forward", self._forward), ("draft", self._draft), ("light", self._light))
                if part is not None
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
        if not isinstance(profile, Mapping):
            raise ValueError(f"the profile is a {type(profile).__name__} and no object: calibrate again.")
        version = profile.get("schema_version")
        if version not in (1, SCHEMA_VERSION):
            raise ValueError(
                f"schema_version of the profile is {version!r}, this version reads {SCHEMA_VERSION}: calibrate again."
            )
        try:
            columns = profile["points"]["columns"]
            points = [Point(**dict(zip(columns, row, strict=True))) for row in profile["points"]["rows"]]
            constants = ModelConstants(**profile["constants"])
            meta = dict(profile["meta"])
            if version == 1:  # an older form of the model, with the same points
                return cls.fit(points, constants, meta)
            target = [p for p in points if p.component in _DECODING]
            forward = _Forward.from_dict(
                profile["model"]["forward"], target + _beyond(target, points), constants, draft=False
            )

            def drafting(component: Component) -> _Forward:
                measured = [p for p in points if p.component == component]
                return _Forward.from_dict(profile["model"][component], measured, constants, draft=True)

            draft = drafting("draft")
            light = drafting("light") if "light" in profile["model"] else None
        except (KeyError, TypeError) as error:
            raise ValueError(f"the profile is not one of ours ({error}): calibrate again.") from error
        return cls(forward, draft, light, points, constants, meta)

    @classmethod
    def from_profile(cls, path: str | Path) -> CostModel:
        """Read a profile file. Raises ValueError naming the file when it cannot be used."""
        try:
            profile = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
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


def _compute_seconds(forward: _Forward, points: Sequence[Point]) -> float:
    """Cost of one more query row where nothing is memory-bound: four times the measured rows and up."""
    most = max(points, key=lambda p: p.batch * (p.num_draft_tokens + 1))
    rows = most.num_draft_tokens + 1.0
    batch, seq = np.full(2, float(most.batch)), np.full(2, float(most.seq))
    low, high = forward.time(batch, seq, np.array([4.0 * rows - 1.0, 8.0 * rows - 1.0]))
    return float((high - low) / (4.0 * rows * most.batch))


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
