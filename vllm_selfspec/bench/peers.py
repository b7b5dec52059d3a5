"""The ways of decoding that `vllm-selfspec bench` compares with plain decoding, by the names used on its command line.

    ngram, suffix, draft_model    vLLM's own
    draft_model_table             vLLM's draft model with its static table of draft lengths by batch size
    selfspec                      {"method": "selfspec"}: on CPU the whole model drafts, at int8 or int4
    int8, int4                    the same at one precision
    exit                          selfspec, the first --exit-layer layers drafting at the model's own precision
    drafter                       selfspec with any --drafter
    off                           selfspec that never drafts: what the package's mends and kernels do by themselves

`NAME@γ` asks for γ draft tokens in every step. Without it selfspec adapts, and vLLM's methods take their default.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from vllm_selfspec.errors import UsageError

DEFAULT_PEERS = "ngram,suffix,draft_model,draft_model_table,selfspec,int8,int8@3,int4,exit"
SELFSPEC_DRAFTERS: dict[str, dict[str, Any]] = {
    "selfspec": {},
    "int8": {"weights": "int8", "lm_head": "int8"},
    "int4": {"weights": "int4", "lm_head": "int4"},
    "exit": {"weights": "native", "lm_head": "native"},
    "drafter": {},
    "off": {"weights": "native", "lm_head": "native"},
}
VLLM_METHODS = ("ngram", "suffix", "draft_model", "draft_model_table")
_DEFAULT_DRAFT_TOKENS = 3
# Words of two to four tokens: vLLM's own default looks for five, which texts of a hundred tokens hardly repeat.
_LOOKUP = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}


@dataclass(frozen=True)
class Peer:
    """One way of decoding.

    Attributes:
        name: as on the command line.
        speculative_config: vLLM's `speculative_config`; empty where it cannot be run here.
        skip: why it cannot be run here, None if it can.
    """

    name: str
    speculative_config: dict[str, Any]
    skip: str | None = None

    @property
    def is_selfspec(self) -> bool:
        """Whether this package drafts."""
        return self.name.partition("@")[0] in SELFSPEC_DRAFTERS


@dataclass(frozen=True)
class Choices:
    """The options of the command line that shape peers.

    Attributes:
        draft_model: checkpoint folder or hub id of a smaller model.
        draft_sample_method: vLLM's: `greedy` or `probabilistic`.
        table: rows (first batch size, last batch size, draft tokens); by default `default_table`.
        exit_layer: layers of the peer `exit`.
        drafter: the peer `drafter`.
        synthetic_acceptance: probability with which each draft token is accepted, None for the real thing.
    """

    draft_model: str | None = None
    draft_sample_method: str = "greedy"
    table: list[list[int]] | None = None
    exit_layer: int | None = None
    drafter: dict[str, Any] | None = None
    synthetic_acceptance: float | None = None


def choose_peers(names: str, choices: Choices) -> list[Peer]:
    """The peers that a comma-separated list names.

    Raises:
        UsageError: for unknown or repeated names, and for what selfspec refuses.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if not asked:
        raise UsageError(f"--peers: names nothing to compare with; use some of {', '.join(_known())}")
    if len(set(asked)) < len(asked):
        raise UsageError("--peers: names the same peer twice")
    return [_peer(name, choices) for name in asked]


def default_table(num_draft_tokens: int) -> list[list[int]]:
    """Rows (first, last, draft tokens): all for one or two requests, half for up to four, none for more."""
    return [[1, 2, num_draft_tokens], [3, 4, (num_draft_tokens + 1) // 2], [5, 1024, 0]]


def _known() -> tuple[str, ...]:
    return (*VLLM_METHODS, *SELFSPEC_DRAFTERS)


def _peer(text: str, choices: Choices) -> Peer:
    name, at, count = text.partition("@")
    if name not in _known():
        raise UsageError(f"--peers: there is no {name}; use some of {', '.join(_known())}")
    if at and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise UsageError(f"--peers: {text} needs a number of draft tokens behind the @, such as {name}@3")
    fixed = int(count) if at else None
    if name in SELFSPEC_DRAFTERS:
        return _selfspec(text, name, fixed, choices)
    return _vllm(text, name, fixed, choices)


def _selfspec(text: str, name: str, fixed: int | None, choices: Choices) -> Peer:
    from vllm_selfspec.config import ConfigError, SelfSpecConfig

    drafter: dict[str, Any] = dict(SELFSPEC_DRAFTERS[name])
    if name == "exit":
        if choices.exit_layer is None:
            return Peer(text, {}, skip="needs --exit-layer")
        drafter["exit_layer"] = choices.exit_layer
    if name == "drafter":
        if choices.drafter is None:
            return Peer(text, {}, skip="needs --drafter")
        drafter = choices.drafter
    config: dict[str, Any] = {"method": "selfspec", "drafter": drafter}
    if fixed is not None:
        config |= {"num_speculative_tokens": fixed, "control": {"mode": "fixed"}}
    if name == "off":
        config["control"] = {"mode": "off"}
    try:
        SelfSpecConfig.parse(config)
    except ConfigError as error:
        raise UsageError(f"--peers: {text}: {error}") from None
    return Peer(text, config)


def _vllm(text: str, name: str, fixed: int | None, choices: Choices) -> Peer:
    if name == "suffix":
        reason = _suffix_missing()
        config: dict[str, Any] = {"method": "suffix"}
        if fixed is not None:
            config["num_speculative_tokens"] = fixed
    else:
        reason = None
        config = {"method": name, "num_speculative_tokens": fixed or _DEFAULT_DRAFT_TOKENS}
    if name == "ngram":
        config |= _LOOKUP
    if name.startswith("draft_model"):
        if choices.draft_model is None:
            return Peer(text, {}, skip="needs --draft-model")
        config |= {
            "method": "draft_model",
            "model": choices.draft_model,
            "draft_sample_method": choices.draft_sample_method,
        }
        if name == "draft_model_table":
            table = choices.table or default_table(config["num_speculative_tokens"])
            config["num_speculative_tokens_per_batch_size"] = table
    if choices.synthetic_acceptance is not None:
        if not name.startswith("draft_model"):
            reason = "how much it drafts depends on the text, and dummy weights write none"
        config |= synthetic_settings(choices.synthetic_acceptance, config.get("num_speculative_tokens", 1))
    return Peer(text, config, skip=reason) if reason is None else Peer(text, {}, skip=reason)


def _suffix_missing() -> str | None:
    """Why vLLM's suffix decoding cannot run here, None if it can."""
    try:
        importlib.import_module("arctic_inference.suffix_decoding")
    except ImportError as error:
        return f"needs the package arctic-inference, which cannot be imported here ({error})"
    return None


def synthetic_settings(acceptance: float, num_draft_tokens: int) -> dict[str, Any]:
    """Fields of vLLM's SpeculativeConfig that accept each draft token, given the one before, with one probability."""
    return {
        "rejection_sample_method": "synthetic",
        # vLLM wants the probability that position i and all before it are accepted.
        "synthetic_acceptance_rates": [acceptance ** (place + 1) for place in range(num_draft_tokens)],
    }
