"""From measured component times to a profile, and how far to trust it: cross-validation.

A sweep is a CSV with one row per (batch, seq, gamma, mode): `target_decode` is a plain decoding forward (gamma 0),
`target_verify` the target forward over gamma + 1 rows per request, `drafter_decode` one draft forward inside a cycle of
gamma drafts. Other modes, and rows with batch or seq 0 (start-up, measured before the first operating point was set),
are left out. Times are medians in milliseconds: the sweep's means mix in the warm-up of the next operating point.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vllm_selfspec.control.cost_model import Component, CostModel, ModelConstants, Point

_MODES: dict[str, Component] = {"target_decode": "target", "target_verify": "verify", "drafter_decode": "draft"}
_COLUMNS = ("batch", "seq", "gamma", "mode", "median_ms")
# A sweep's spread says little of its medians' errors: they repeat within 0.3 % where a few late requests spread
# the times by a tenth, and lie far off where all were late and nothing spreads. The fit finds those by itself.
_SWEEP_NOISE = 0.005
ACCEPTANCES = (0.7, 0.8, 0.9, 0.95, 0.98)


def read_sweep(path: str | Path) -> tuple[list[Point], str | None]:
    """Read a sweep CSV.

    Returns:
        The usable points and the model's name (None when there is no such column).

    Raises:
        ValueError: a column is missing, a row cannot be read, or several models are mixed.
    """
    try:
        with Path(path).open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} has no column {missing[0]!r}: a sweep needs {', '.join(_COLUMNS)}.")
            rows = list(reader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    models = {row["model"] for row in rows if row.get("model")}
    if len(models) > 1:
        raise ValueError(f"{path} mixes the models {', '.join(sorted(models))}: give one sweep for each.")
    points = []
    for number, row in enumerate(rows, start=2):
        component = _MODES.get(row["mode"])
        try:
            batch, seq, gamma = int(row["batch"]), int(row["seq"]), int(row["gamma"])
            if component is None or batch < 1 or seq < 1:
                continue
            seconds = round(float(row["median_ms"]) / 1e3, 9)
            points.append(Point(component, batch, seq, gamma, seconds, _SWEEP_NOISE))
        except (TypeError, ValueError) as error:
            raise ValueError(f"line {number} of {path} cannot be read ({error}): mend or remove it.") from error
    return points, models.pop() if models else None


def read_constants(path: str | Path) -> tuple[ModelConstants, dict[str, Any]]:
    """Read what is known beforehand: a fit with `hardware` and `model` sections, or a Hugging Face `config.json`.

    Returns:
        The constants and the facts about model and hardware worth keeping in the profile.

    Raises:
        ValueError: the file is neither.
    """
    try:
        raw = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    if isinstance(raw, dict) and "hardware" in raw and "model" in raw:
        hardware, model = raw["hardware"], raw["model"]
        constants = ModelConstants(
            weight_bytes=model.get("W_t"),
            draft_weight_bytes=model.get("W_d"),
            flops_per_token=model.get("C_dense"),
            kv_bytes_per_token=model.get("kappa_theoretical"),
            bandwidth=hardware.get("BW_peak"),
            flops=hardware.get("F_peak"),
        )
        return constants, {"model": model.get("name"), "hardware": hardware.get("gpu")}
    if isinstance(raw, dict) and "hidden_size" in raw and "num_hidden_layers" in raw:
        return constants_from_config(raw), {"model": raw.get("_name_or_path") or None}
    raise ValueError(f"{path} is neither a constants file (sections hardware, model) nor a Hugging Face config.json.")


def constants_from_config(config: Mapping[str, Any], bytes_per_weight: float = 2.0) -> ModelConstants:
    """Constants of a dense decoder from its Hugging Face config: weights read per step, FLOP per row, KV per token."""
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * int(config["intermediate_size"])
    weights = layers * (attention + mlp) + hidden * int(config["vocab_size"])
    return ModelConstants(
        weight_bytes=bytes_per_weight * weights,
        flops_per_token=2.0 * weights,
        kv_bytes_per_token=2.0 * bytes_per_weight * layers * kv_heads * head,
    )


@dataclass(frozen=True)
class Validation:
    """Errors on points that the fit did not see, as fractions.

    `sign_accuracy`: points where predicted and measured speedup lie on the same side of 1, averaged over the
    acceptances. `cycle_mape`: mean |predicted/measured - 1| of γ·T_D + T_V. `regret`: mean time per token lost, in
    measured times, by choosing γ (0 included) from predictions instead of from the measurements. The `_by_acceptance`
    fields split sign accuracy and regret by acceptance per token α, with τ(γ) = (1 - α^(γ+1))/(1 - α).
    """

    name: str
    num_points: int
    sign_accuracy: float
    cycle_mape: float
    regret: float
    target_mape: float
    verify_mape: float
    draft_mape: float
    sign_by_acceptance: dict[float, float]
    regret_by_acceptance: dict[float, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def acceptance_length(num_draft_tokens: Any, acceptance: float) -> Any:
    """τ(γ) for one acceptance per token, scalars or arrays."""
    return (1.0 - acceptance ** (np.asarray(num_draft_tokens) + 1.0)) / (1.0 - acceptance)


def cross_validate(
    points: Sequence[Point],
    constants: ModelConstants | None = None,
    *,
    leave_out: str = "gamma",
    acceptances: Sequence[float] = ACCEPTANCES,
    fit: Callable[[list[Point]], CostModel] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Fit without one group at a time and compare with it.

    Args:
        points: all measured points.
        constants: passed on to the fit.
        leave_out: "gamma" leaves out all cycles (draft and verify) of one γ; "batch" everything of one batch size;
            "nothing" fits once to all (in-sample).
        acceptances: per-token acceptances to judge signs and choices at.
        fit: how to fit; default `CostModel.fit`.
        progress: called with (folds done, folds).

    Raises:
        ValueError: no operating point has target, verify and draft times, or there is only one group.
    """
    fit = fit or (lambda kept: CostModel.fit(kept, constants))
    measured: dict[Component, dict[tuple[int, int, int], float]] = {name: {} for name in get_args(Component)}
    for point in points:
        measured[point.component][point.batch, point.seq, point.num_draft_tokens] = point.seconds
    keys = sorted(key for key in measured["verify"] if key in measured["draft"] and (*key[:2], 0) in measured["target"])
    if not keys:
        raise ValueError("no operating point of the sweep has target, verify and draft times: nothing to validate on.")
    position = {"batch": 0, "gamma": 2, "nothing": -1}[leave_out]
    groups = sorted({key[position] for key in keys}) if position >= 0 else [None]
    if len(groups) < 2 and position >= 0:
        raise ValueError(f"the sweep has one {leave_out} only: leaving it out leaves nothing to fit.")
    parts: dict[str, list[float]] = {name: [] for name in ("cycle", "target", "verify", "draft")}
    signs: dict[float, list[bool]] = {alpha: [] for alpha in acceptances}
    regrets: dict[float, list[float]] = {alpha: [] for alpha in acceptances}
    for done, group in enumerate(groups):
        model = fit([p for p in points if group is None or not _belongs(p, leave_out, group)])
        held = [key for key in keys if group is None or key[position] == group]
        batch, seq, gamma = np.array(held, dtype=float).T
        truth = {
            "target": np.array([measured["target"][*key[:2], 0] for key in held]),
            "verify": np.array([measured["verify"][key] for key in held]),
            "draft": np.array([measured["draft"][key] for key in held]),
        }
        guess = {
            "target": model.target_time(batch, seq),
            "verify": model.verify_time(batch, seq, gamma),
            "draft": model.draft_time(batch, seq, gamma),
        }
        for values in (truth, guess):
            values["cycle"] = gamma * values["draft"] + values["verify"]
        for name, errors in parts.items():
            errors.extend(np.abs(guess[name] / truth[name] - 1.0).tolist())
        for alpha in acceptances:
            tau = acceptance_length(gamma, alpha)
            agree = (tau * guess["target"] > guess["cycle"]) == (tau * truth["target"] > truth["cycle"])
            signs[alpha].extend(agree.tolist())
            regrets[alpha].extend(_regrets(model, measured, sorted({key[:2] for key in held}), alpha))
        if progress is not None:
            progress(done + 1, len(groups))
    return Validation(
        name={"gamma": "leave one γ out", "batch": "leave one batch size out", "nothing": "in sample"}[leave_out],
        num_points=len(keys),
        sign_accuracy=_mean(value for values in signs.values() for value in values),
        cycle_mape=_mean(parts["cycle"]),
        regret=_mean(value for values in regrets.values() for value in values),
        target_mape=_mean(parts["target"]),
        verify_mape=_mean(parts["verify"]),
        draft_mape=_mean(parts["draft"]),
        sign_by_acceptance={alpha: _mean(values) for alpha, values in signs.items()},
        regret_by_acceptance={alpha: _mean(values) for alpha, values in regrets.items()},
    )


def _belongs(point: Point, leave_out: str, group: int) -> bool:
    if leave_out == "batch":
        return point.batch == group
    return point.component != "target" and point.num_draft_tokens == group


def _regrets(
    model: CostModel,
    measured: Mapping[Component, Mapping[tuple[int, int, int], float]],
    places: Iterable[tuple[int, int]],
    alpha: float,
) -> list[float]:
    """Time per token lost at each (batch, seq) by the model's choice among the measured γ."""
    lost = []
    for batch, seq in places:
        both = measured["verify"].keys() & measured["draft"].keys()
        gammas = [0, *sorted(g for b, s, g in both if (b, s) == (batch, seq))]
        tau = acceptance_length(gammas, alpha)
        cost = [
            measured["target"][batch, seq, 0]
            if gamma == 0
            else measured["verify"][batch, seq, gamma] + gamma * measured["draft"][batch, seq, gamma]
            for gamma in gammas
        ]
        per_token = np.array(cost) / tau
        chosen = int(np.argmin(np.asarray(model.cycle_time(batch, seq, gammas)) / tau))
        lost.append(float(per_token[chosen] / per_token.min() - 1.0))
    return lost


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return math.fsum(collected) / len(collected)


def profile_from_sweep(
    sweep: str | Path,
    constants_path: str | Path | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
) -> CostModel:
    """Fit a profile to a sweep CSV. `meta` overrides what the two files say about model, hardware and drafter."""
    points, model_name = read_sweep(sweep)
    constants, facts = read_constants(constants_path) if constants_path is not None else (ModelConstants(), {})
    identity = {"model": model_name, "hardware": None, "drafter": None, "source": f"sweep {Path(sweep).name}"}
    for source in ({"model": model_name}, facts, meta or {}):
        identity.update({name: value for name, value in source.items() if value is not None})
    return CostModel.fit(points, constants, identity)


def profile_from_live(
    measure: Callable[[Component, int, int, int], float],
    operating_points: Iterable[tuple[Component, int, int, int]],
    meta: Mapping[str, Any],
    constants: ModelConstants | None = None,
) -> CostModel:
    """Fit a profile to a few times of the real engine.

    Args:
        measure: returns the seconds of one (component, batch, seq, num_draft_tokens), already a median of repeats.
        operating_points: what to measure; every γ of a "draft" point should be 0 unless the engine pads by it.
        meta: identity of model, hardware, drafter and versions.
        constants: see `CostModel.fit`.
    """
    points = [Point(*where, seconds=measure(*where), noise=0.03) for where in operating_points]
    return CostModel.fit(points, constants, {"source": "measured at start-up", **meta})
