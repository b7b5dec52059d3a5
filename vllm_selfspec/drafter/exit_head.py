"""A trained exit head: what turns the hidden state of an early layer into one that the target's final norm and LM head
understand.

It is one residual block without attention, x + down(silu(up(norm(x)))), so it has no keys and values, and a draft
stays one pass over the layers before it. It is trained by `vllm-selfspec train-exit` against the model's own
distribution. A head that does not fit the weights any more drafts worse, never wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_selfspec.config import ConfigError, Precision

FORMAT = "selfspec-exit-head-1"
_EPSILON = 1e-6


@dataclass(frozen=True)
class ExitHeadInfo:
    """What an exit head's file says of it.

    Attributes:
        model: the model that it was trained for, as it was called then.
        exit_layer: layers that run before the head.
        hidden_size, width: of its two matrices, [width, hidden_size] and [hidden_size, width].
    """

    model: str
    exit_layer: int
    hidden_size: int
    width: int


class ExitHead(nn.Module):
    """x + down(silu(up(norm(x)))), in the calling convention of vLLM's decoder layers; the identity at first."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(hidden_size))
        self.up: nn.Module = nn.Linear(hidden_size, width, bias=False)
        self.down: nn.Module = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to hidden states x [..., hidden_size]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)
        result: torch.Tensor = self.down(nn.functional.silu(self.up(normed.to(x.dtype) * self.norm)))
        return result

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and residual [T, hidden_size], whose sum the final norm takes; positions are not used."""
        x = hidden_states if residual is None else hidden_states + residual
        return self.change(x), x


class _Known(nn.Module):
    """A layer that is to be called as an `ExitHead` is, and whose states are known."""

    def __init__(self, positions: torch.Tensor, change: torch.Tensor, x: torch.Tensor) -> None:
        super().__init__()
        self._positions, self._known = positions, (change, x)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.equal(positions, self._positions) or not hidden_states.is_floating_point():
            raise TypeError("other arguments")
        return self._known


@torch.inference_mode()
def fits_behind(decoder: Any, config: Any) -> bool:
    """Whether a decoder stack takes a last layer that is called, and answers, as an `ExitHead` does.

    Args:
        decoder: a copy of vLLM's stack, whose layers may be exchanged.
        config: vLLM's `ModelConfig`.
    """
    layers = decoder.layers
    positions = torch.tensor([2, 5], device=next(decoder.parameters()).device)
    # Not from tokens: an embedding may have adapters, which are not set up yet.
    change, x, embedded = torch.randn(3, 2, config.get_hidden_size(), dtype=config.dtype, device=positions.device)
    decoder.layers = nn.ModuleList([_Known(positions, change.clone(), x.clone())])
    decoder.start_layer, decoder.end_layer = 0, 1
    try:
        result, expected = decoder.forward(None, positions, None, embedded), decoder.norm(x + change)
        return bool((result - expected).abs().max() <= 0.05 * expected.abs().max())
    except Exception:  # such as arguments in another order: whatever it is, a head would meet it too
        return False
    finally:
        decoder.layers = layers


class _Quantized(nn.Module):
    """A linear layer at the drafter's precision."""

    def __init__(self, weight: torch.Tensor, precision: Precision, light: torch.Tensor) -> None:
        super().__init__()
        from vllm_selfspec.drafter.quantize import quantize

        self.state = quantize(weight, precision, light)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.state.apply(x, None)


def save(head: ExitHead, info: ExitHeadInfo, path: Path) -> None:
    """Write a head and what it was trained for, as one safetensors file."""
    metadata = {"format": FORMAT} | {name: str(value) for name, value in asdict(info).items()}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, path, metadata=metadata)


def read_info(path: str) -> ExitHeadInfo:
    """What the file at `path` says of its head.

    Raises:
        ConfigError: if it is not the file of an exit head.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"drafter.exit_head {path!r} cannot be read ({error}): give a file written by vllm-selfspec train-exit."
        ) from None
    if metadata.get("format") != FORMAT:
        raise ConfigError(
            f"drafter.exit_head {path!r} is not an exit head: give a file written by vllm-selfspec train-exit."
        )
    numbers = {name: int(metadata[name]) for name in ("exit_layer", "hidden_size", "width")}
    return ExitHeadInfo(model=metadata["model"], **numbers)


def load(
    path: str, precision: Precision, light: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[ExitHead, Callable[[], None]]:
    """The head at `path`, ready to draft: its matrices at the drafter's precision, the rest in the model's dtype.

    Args:
        light: as of `quantize`.

    Returns:
        the head, and a function that writes its weights again, in place: sleep discards what lies on a GPU.

    Raises:
        ConfigError: if it holds an infinity or NaN, with which vLLM's rejection sampler would not be exact.
    """
    info, saved = read_info(path), load_file(path)
    if not all(bool(tensor.isfinite().all()) for tensor in saved.values()):
        raise ConfigError(
            f"drafter.exit_head {path!r} holds numbers that are not finite: train it again with a lower learning rate."
        )
    head = ExitHead(info.hidden_size, info.width)
    head.load_state_dict(saved)
    head = head.to(device=device, dtype=dtype).requires_grad_(False)
    if precision != "native":
        head.up, head.down = (_Quantized(layer.weight, precision, light) for layer in (head.up, head.down))

    def restore() -> None:
        head.norm.copy_(saved["norm"])
        for layer, weight in ((head.up, saved["up.weight"]), (head.down, saved["down.weight"])):
            if isinstance(layer, _Quantized):
                layer.state.refresh(weight.to(device=device, dtype=dtype))
            else:
                layer.weight.copy_(weight)

    return head, restore
