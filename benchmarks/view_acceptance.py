"""What each part of a model costs in acceptance when it is quantized: plain transformers, no engine.

    python benchmarks/view_acceptance.py MODEL [--tokens 96] [--dtype bfloat16] [--out FILE.json]

The model answers the package's embedded prompts at temperature 1. Over those very texts the expected acceptance of a
draft, the sum of min(p, q) over the vocabulary, is computed for views of it whose weights are quantized and written
back in its dtype. The context is the target's own, so this is the acceptance of a first draft; later ones read keys and
values of the drafter's. Activations are not quantized. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from result_file import new_out, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_selfspec.drafter.quantize import int4_groups
from vllm_selfspec.drafter.quantize_cuda import quantize_int4, quantize_per_channel
from vllm_selfspec.prompts import embedded_prompts, encode_prompt
from vllm_selfspec.provenance import provenance

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
Name = Callable[[str], bool]


def int8(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric per output channel."""
    quantized, scale = quantize_per_channel(weight, torch.int8)
    return quantized * scale


def int4(weight: torch.Tensor, fits: int) -> torch.Tensor:
    """Groups of 64, with so many fits of each group's scale and zero."""
    q, pairs = int4_groups(weight, torch.bfloat16, fits)
    scale, zero = pairs.float().unsqueeze(-1).unbind(-2)
    return ((q.float() - 8) * scale + zero).flatten(1)


def int4_cuda(weight: torch.Tensor, group: int, fits: int) -> torch.Tensor:
    """As on CUDA: symmetric groups, with so many fits of each group's scale."""
    packed, scale = quantize_int4(weight, group, torch.bfloat16, fits)
    q = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    return ((q.reshape(*scale.shape, group) - 8) * scale.float().unsqueeze(-1)).flatten(1)


def views() -> dict[str, Callable[[str, torch.Tensor], torch.Tensor]]:
    """Each view's weight for a layer's name and weight."""

    def mostly_int4(kept: Name, fits: int = 2) -> Callable[[str, torch.Tensor], torch.Tensor]:
        return lambda name, weight: int8(weight) if kept(name) else int4(weight, fits)

    def inputs(name: str) -> bool:
        return name.endswith(ATTENTION_INPUTS)

    return {
        "int8": lambda name, weight: int8(weight),
        "int4, from least to greatest": mostly_int4(lambda name: False, fits=0),
        "int4, fitted": mostly_int4(lambda name: False),
        "int4, keys and values int8": mostly_int4(lambda name: name.endswith(ATTENTION_INPUTS[1:])),
        "int4, attention's inputs int8": mostly_int4(inputs),
        "int4, attention's output int8": mostly_int4(lambda name: name.endswith("o_proj")),
        "int4, MLP int8": mostly_int4(lambda name: ".mlp." in name),
        "int4 for CUDA": lambda name, weight: int4_cuda(weight, 64, 2),
        "int4 for CUDA, not fitted": lambda name, weight: int4_cuda(weight, 64, 0),
        "int4 for CUDA, groups of 128, not fitted": lambda name, weight: int4_cuda(weight, 128, 0),
        "int4 for CUDA, attention's inputs int8": lambda name, weight: (
            int8(weight) if inputs(name) else int4_cuda(weight, 64, 2)
        ),
        "int4, attention's inputs and head int8": mostly_int4(lambda name: inputs(name) or name == "lm_head"),
    }


@torch.inference_mode()
def answers(model: torch.nn.Module, tokenizer: object, tokens: int) -> list[tuple[int, torch.Tensor]]:
    """For each prompt its length and the ids of prompt and answer [1, T]."""
    torch.manual_seed(0)
    texts = []
    for record in embedded_prompts():
        ids = torch.tensor([encode_prompt(tokenizer, record)])
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        texts.append((ids.shape[1], model.generate(ids, max_new_tokens=tokens, **options)))
    return texts


@torch.inference_mode()
def log_probs(model: torch.nn.Module, texts: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """[N, V] of every answer token."""
    return torch.cat([model(ids).logits[0, start - 1 : -1].float().log_softmax(dim=-1) for start, ids in texts])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = new_out(parser, arguments.out)
    origin = provenance()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = {name: module.weight.data for name, module in linears.items()}

    texts = answers(model, tokenizer, arguments.tokens)
    p = log_probs(model, texts)
    rows: dict[str, dict[str, float]] = {}
    result = {
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "answer_tokens": len(p),
        "share_of_attention_inputs": round(
            sum(w.numel() for name, w in weights.items() if name.endswith(ATTENTION_INPUTS))
            / sum(w.numel() for name, w in weights.items() if name != "lm_head"),
            4,
        ),
        "views": rows,
        **origin,
    }
    for label, view in views().items():
        began = time.perf_counter()
        for name, weight in weights.items():
            quantized = torch.cat([view(name, part) for part in weight.split(16384)]).to(weight.dtype)
            linears[name].weight = torch.nn.Parameter(quantized, requires_grad=False)
        accepted = torch.minimum(log_probs(model, texts), p).exp_().sum(dim=-1)
        error = accepted.std() / len(accepted) ** 0.5
        rows[label] = {"acceptance": round(float(accepted.mean()), 4), "standard_error": round(float(error), 4)}
        seconds = time.perf_counter() - began
        print(f"{label:40s} {rows[label]['acceptance']:.4f} ± {rows[label]['standard_error']:.4f}  ({seconds:.0f} s)")
        save(out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
