"""What a user may ask for: the `speculative_config` dict of `method: selfspec`, checked field by field.

Every refusal is one sentence that names the field and how to mend it. This module knows neither vLLM nor torch, so it
can be imported by the command line and by tests without either.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

Precision = Literal["native", "int8", "int4", "int4+int8", "fp8"]
ENV_VAR = "VLLM_SELFSPEC"


class ConfigError(ValueError):
    """A `selfspec` setting that cannot be honoured; the message is one sentence that names the field and the mend."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_bool(cls, value: Any) -> Any:
        """No setting is a switch, and to Python `True` is the number 1."""
        if any(isinstance(each, bool) for each in (value if isinstance(value, list | tuple) else [value])):
            raise PydanticCustomError("no_bool", "true and false are no values of it, see the README")
        return value


class DrafterConfig(_Strict):
    """Which layers draft, at what precision, with what head.

    `weights` and `lm_head` left out (None) mean "per platform": the cheapest precision that its kernels support, or
    `int4+int8`, between which the controller chooses. `experts` left out means that of `weights`, or as they are where
    they cannot be quantized.
    """

    weights: Precision | None = Field(None, description="precision of the drafter's linear layers")
    lm_head: Precision | None = Field(None, description="precision of the drafter's LM head")
    experts: Precision | None = Field(None, description="precision of the experts of a mixture")
    exit_layer: int | None = Field(None, ge=1, description="draft with layers 0..n-1, then the final norm and LM head")
    skip_layers: tuple[int, ...] = Field((), description="layers the drafter leaves out")
    exit_head: str | None = Field(None, description="path of a trained exit head")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the target layers that the drafter runs, in order.

        Args:
            num_layers: number of decoder layers of the target.

        Raises:
            ConfigError: if `exit_layer` or `skip_layers` do not fit a model of `num_layers` layers.
        """
        depth = num_layers if self.exit_layer is None else self.exit_layer
        if self.exit_layer is not None and self.exit_layer >= num_layers:
            raise ConfigError(
                f"drafter.exit_layer is {self.exit_layer}, but the model has {num_layers} layers: "
                f"set it between 1 and {num_layers - 1}, or leave it out to draft with all layers."
            )
        for layer in self.skip_layers:
            if not 0 <= layer < depth:
                raise ConfigError(
                    f"drafter.skip_layers names layer {layer}, but the drafter has layers 0 to {depth - 1}: "
                    "remove it from the list."
                )
        skipped = set(self.skip_layers)
        kept = tuple(layer for layer in range(depth) if layer not in skipped)
        if not kept:
            raise ConfigError("drafter.skip_layers leaves no layer to draft with: keep at least one.")
        return kept

    def usual_acceptance(self, light_view: bool) -> float:
        """Acceptance of a draft (of the main view, beside a light one) as long as none was verified.

        With all layers, int8 had 0.92 to 0.99 and int4 0.80 to 0.96: docs/measurements.md.
        """
        if self.exit_layer is not None or self.skip_layers:
            return 0.8
        return 0.95 if light_view or self.weights in ("native", "int8", "fp8") else 0.9


class ControlConfig(_Strict):
    """How many tokens are drafted in each step."""

    mode: Literal["adaptive", "fixed", "off"] = Field("adaptive", description="who picks the draft length")
    profile: str = Field("auto", description="`auto` (measured at start-up, cached) or the path of a profile")
    margin: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="relative gain that drafting must promise to be switched on; for a longer draft a quarter of it",
    )
    probe_interval: int = Field(256, ge=1, description="steps without drafting after which one probe may be made")
    probe_budget: float = Field(0.01, ge=0, le=0.2, description="fraction of the time that probes may cost")
    acceptance_window: float = Field(512.0, gt=1, description="verified drafts after which old evidence has faded")
    acceptance_prior: float | None = Field(
        None, gt=0, lt=1, description="acceptance assumed before any draft was verified; None: by the drafter"
    )
    per_request_batch: int = Field(
        0, ge=0, description="up to this many running requests each one's own acceptance is used; 0: the pooled one"
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _is_off(cls, mode: Any) -> Any:
        """YAML 1.1 reads `off` as false."""
        return "off" if mode is False else mode


class SelfSpecConfig(_Strict):
    """The whole `speculative_config` of `method: selfspec`.

    `num_speculative_tokens` is the most that may be drafted in one step.
    """

    method: Literal["selfspec"] = "selfspec"
    num_speculative_tokens: int = Field(7, ge=1, le=32, description="most tokens drafted in one step")
    drafter: DrafterConfig = Field(default_factory=DrafterConfig)  # type: ignore[arg-type]  # pydantic fills defaults
    control: ControlConfig = Field(default_factory=ControlConfig)  # type: ignore[arg-type]  # pydantic fills defaults

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> SelfSpecConfig:
        """Check a raw `speculative_config` dict.

        Raises:
            ConfigError: one sentence about the first field that is wrong.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(_first_error(error)) from None

    @classmethod
    def from_env(cls, value: str) -> SelfSpecConfig | None:
        """The config in the environment variable `VLLM_SELFSPEC`: the same JSON, `1` for all defaults, empty or `0`
        for none.

        Raises:
            ConfigError: if the value is neither, or its JSON is wrong.
        """
        value = value.strip()
        if value in ("", "0"):
            return None
        if value == "1":
            return cls.parse({})
        try:
            raw = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{ENV_VAR} is not JSON ({error}): set it to 1 for the defaults, or to a JSON object."
            ) from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{ENV_VAR} must be 1 or a JSON object, not {type(raw).__name__}.")
        return cls.parse(raw)


def _first_error(error: ValidationError) -> str:
    """One sentence for the first problem that pydantic found."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        models: dict[str, type[_Strict]] = {"drafter": DrafterConfig, "control": ControlConfig}
        model = models[str(problem["loc"][0])] if len(problem["loc"]) > 1 else SelfSpecConfig
        return f"{field} is not a selfspec setting: use one of {', '.join(model.model_fields)}."
    return f"{field} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."
