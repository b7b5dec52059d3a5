"""`vllm-selfspec train-exit`: trains an exit head on the model's own text."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_selfspec.errors import UsageError
from vllm_selfspec.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from rich.console import Console

_HELD_OUT = 0.1
_WIDTH_MULTIPLE = 64


def train_exit(
    exit_layer: Annotated[int, typer.Option(help="Layers that the drafter runs before the head.", min=1)],
    out: Annotated[Path, typer.Option(help="Where to write the head.", metavar="HEAD.safetensors")],
    model: Annotated[str, typer.Option(help="Model: folder or hub id.")] = DEFAULT_MODEL,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with `prompt` or `messages`; default: the embedded ones.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the model's own text to train on.", min=100)] = 20_000,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.", min=2)] = 128,
    batch: Annotated[int, typer.Option(help="Answers written at once.", min=1)] = 16,
    width: Annotated[int | None, typer.Option(help="Of the head; default: twice the hidden size.", min=1)] = None,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 400,
    rows: Annotated[int, typer.Option(help="Tokens in a training step.", min=1)] = 256,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at the start.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the text and the training.")] = 0,
    device: Annotated[str | None, typer.Option(help="`cpu`, `cuda`; default: a GPU if there is one.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on the last line.")] = False,
) -> None:
    """Train a head for `drafter.exit_head`, and say how many of its drafts will be accepted.

    The model writes text at temperature 1, the head learns its distribution from the hidden states of an early layer.
    A tenth of the prompts is held out; the overlap on their answers is the acceptance to expect of a draft.
    """
    import torch
    from rich.console import Console
    from safetensors import SafetensorError

    from vllm_selfspec.drafter.exit_head import ExitHead, ExitHeadInfo, save
    from vllm_selfspec.exit_training import Target, overlap, train
    from vllm_selfspec.models import resolve_model

    console = Console(stderr=json_)
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out: {out.parent} is not a folder that can be written to")
    path = resolve_model(model, console.print)
    torch.manual_seed(seed)
    target = Target.load(path, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if exit_layer >= len(target.layers):
        raise UsageError(f"--exit-layer: {model} has {len(target.layers)} layers; give fewer than that")
    hidden = _collect(target, path, prompts, exit_layer, tokens, max_new_tokens, batch, console)
    size = hidden.early.shape[1]
    width = width or 2 * size
    width += -width % _WIDTH_MULTIPLE  # the int4 kernels want whole groups
    seen, unseen = hidden.split(_HELD_OUT)
    head = ExitHead(size, width).to(hidden.early.device)
    before = overlap(target, None, unseen)
    _train(train(target, head, seen, steps, rows, learning_rate), steps, console)
    after = overlap(target, head, unseen)
    try:
        save(head, ExitHeadInfo(model, exit_layer, size, width), out)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--out: {out} cannot be written ({error})") from None
    console.print(
        f"Overlap with {model} on {len(unseen)} tokens of held-out prompts: {before:.3f} without a head, "
        f"{after:.3f} with it.",
        highlight=False,
    )
    drafter = {"exit_layer": exit_layer, "exit_head": str(out)}
    use = json.dumps({"method": "selfspec", "drafter": drafter})
    console.print(f"Written: {out}. Use it with\n{use}", highlight=False, soft_wrap=True)
    if json_:
        print(json.dumps({"tokens": len(hidden), "width": width, "overlap_without": before, "overlap": after}))


def _collect(
    target: Any,
    path: str,
    prompts: Path | None,
    exit_layer: int,
    tokens: int,
    max_new_tokens: int,
    batch: int,
    console: "Console",
) -> Any:
    from rich.progress import Progress
    from transformers import AutoTokenizer

    from vllm_selfspec.exit_training import collect
    from vllm_selfspec.prompts import embedded_prompts, encode_prompt, load_prompts

    tokenizer = AutoTokenizer.from_pretrained(path)
    asked = embedded_prompts() if prompts is None else load_prompts(prompts)
    ids = [encode_prompt(tokenizer, prompt) for prompt in asked]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing text", total=tokens)
        return collect(
            target,
            tokenizer,
            ids,
            exit_layer,
            tokens,
            max_new_tokens,
            batch,
            lambda done: progress.update(task, completed=done),
        )


def _train(losses: Any, steps: int, console: "Console") -> None:
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        for loss in losses:
            progress.update(task, advance=1, description=f"training, loss {loss:.3f}")
