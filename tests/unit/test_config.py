"""The flag: defaults, and one sentence for everything that cannot be honoured."""

from __future__ import annotations

import json

import pytest

from vllm_selfspec.config import ConfigError, DrafterConfig, SelfSpecConfig
from vllm_selfspec.control.policy import ControlSettings


def test_defaults():
    settings = SelfSpecConfig.parse({"method": "selfspec"})
    assert settings.control.mode == "adaptive" and settings.control.profile == "auto"
    assert settings.drafter.weights is None and settings.drafter.layers(3) == (0, 1, 2)


def test_every_field_arrives():
    raw = {
        "method": "selfspec",
        "num_speculative_tokens": 5,
        "drafter": {"weights": "int4", "lm_head": "int8", "exit_layer": 6, "skip_layers": [1, 4]},
        "control": {"mode": "fixed", "profile": "p.json", "margin": 0.1, "probe_interval": 9}
        | {"probe_budget": 0.05, "acceptance_window": 99.0, "acceptance_prior": 0.5, "per_request_batch": 2},
    }
    settings = SelfSpecConfig.parse(raw)
    assert settings.num_speculative_tokens == 5
    assert settings.drafter.layers(8) == (0, 2, 3, 5)
    assert settings.control.model_dump() == raw["control"]


def test_off_as_yaml_reads_it():
    """YAML 1.1, and so Hydra, makes false of it."""
    assert SelfSpecConfig.parse({"control": {"mode": False}}).control.mode == "off"
    with pytest.raises(ConfigError, match=r"control\.mode"):
        SelfSpecConfig.parse({"control": {"mode": True}})


def test_the_controllers_own_defaults_are_those_of_the_flag():
    control = SelfSpecConfig.parse({"method": "selfspec"}).control.model_dump(exclude={"profile"})
    assert control.pop("acceptance_prior") is None
    assert ControlSettings(**control) == ControlSettings()


@pytest.mark.parametrize(
    ("drafter", "light_view", "acceptance"),
    [
        ({}, True, 0.95),
        ({}, False, 0.9),
        ({"weights": "int8"}, False, 0.95),
        ({"weights": "int4"}, False, 0.9),
        ({"weights": "int8", "exit_layer": 3}, False, 0.8),
        ({"skip_layers": [1]}, True, 0.8),
    ],
)
def test_what_is_assumed_of_a_drafter_before_it_has_drafted(drafter, light_view, acceptance):
    config = SelfSpecConfig.parse({"method": "selfspec", "drafter": drafter})
    assert config.drafter.usual_acceptance(light_view) == acceptance


@pytest.mark.parametrize(
    ("raw", "field", "mend"),
    [
        ({"num_speculative_token": 3}, "num_speculative_token", "num_speculative_tokens"),
        ({"drafter": {"weight": "int8"}}, "drafter.weight", "weights"),
        ({"control": {"mod": "off"}}, "control.mod", "mode"),
        ({"drafter": {"weights": "int3"}}, "drafter.weights", "int4"),
        ({"control": {"mode": "auto"}}, "control.mode", "adaptive"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens", "greater than or equal to 1"),
        ({"num_speculative_tokens": "many"}, "num_speculative_tokens", "integer"),
        ({"drafter": {"exit_layer": 0}}, "drafter.exit_layer", "greater than or equal to 1"),
        ({"drafter": "int8"}, "drafter", "dictionary"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens", "true and false"),
        ({"drafter": {"skip_layers": [True]}}, "drafter.skip_layers", "true and false"),
        ({"control": {"margin": False}}, "control.margin", "true and false"),
    ],
)
def test_refusals_name_the_field_and_the_mend(raw: dict, field: str, mend: str):
    with pytest.raises(ConfigError) as caught:
        SelfSpecConfig.parse({"method": "selfspec", **raw})
    sentence = str(caught.value)
    assert sentence.startswith(field) and mend in sentence
    assert "\n" not in sentence and sentence.endswith(".")


@pytest.mark.parametrize(
    ("drafter", "num_layers", "field"),
    [
        (DrafterConfig(exit_layer=4), 4, "drafter.exit_layer"),
        (DrafterConfig(exit_layer=9), 4, "drafter.exit_layer"),
        (DrafterConfig(skip_layers=(4,)), 4, "drafter.skip_layers"),
        (DrafterConfig(skip_layers=(-1,)), 4, "drafter.skip_layers"),
        (DrafterConfig(exit_layer=2, skip_layers=(3,)), 4, "drafter.skip_layers"),
        (DrafterConfig(exit_layer=2, skip_layers=(0, 1)), 4, "drafter.skip_layers"),
    ],
)
def test_impossible_layers(drafter: DrafterConfig, num_layers: int, field: str):
    with pytest.raises(ConfigError, match=field):
        drafter.layers(num_layers)


def test_environment_variable():
    assert SelfSpecConfig.from_env("") is None and SelfSpecConfig.from_env("0") is None
    assert SelfSpecConfig.from_env("1") == SelfSpecConfig.parse({})
    raw = {"method": "selfspec", "num_speculative_tokens": 3}
    assert SelfSpecConfig.from_env(json.dumps(raw)) == SelfSpecConfig.parse(raw)
    for wrong in ("yes", "[1]", '{"method": "ngram"}'):
        with pytest.raises(ConfigError):
            SelfSpecConfig.from_env(wrong)
