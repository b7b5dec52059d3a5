"""Tiny random checkpoints, made on the fly with transformers' own configs and classes.

The default initialization of transformers gives nearly uniform logits and, greedily, one token repeated forever: any
two models would agree on it. Here every matrix keeps the variance of its input, so that layers, positions and
quantization errors all show in the logits, greedy text wanders, and cheap drafts are sometimes rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

# vLLM's CPU attention wants heads of at least 32.
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **shape: LlamaConfig(**shape),
    "llama_tied": lambda **shape: LlamaConfig(**(shape | {"tie_word_embeddings": True})),
    "qwen2": lambda **shape: Qwen2Config(**shape),
    "qwen3": lambda **shape: Qwen3Config(**({"head_dim": 32} | shape)),
    "mistral": lambda **shape: MistralConfig(**({"sliding_window": None} | shape)),
    # Windows on every second layer, soft caps, and no head but the embedding.
    "gemma2": lambda **shape: Gemma2Config(
        **({"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 48} | shape | {"tie_word_embeddings": True})
    ),
    "phi3": lambda **shape: Phi3Config(**shape),
    "olmo2": lambda **shape: Olmo2Config(**shape),
    "qwen3_moe": lambda **shape: Qwen3MoeConfig(
        **(
            {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
            | {"decoder_sparse_step": 1, "mlp_only_layers": []}
            | shape
        )
    ),
}


_WINDOWS: dict[str, Any] = {
    "sliding_window": 48,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}

MORE_FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "cohere": lambda **shape: CohereConfig(**({"logit_scale": 0.5} | shape)),
    "cohere2": lambda **shape: Cohere2Config(**(_WINDOWS | {"logit_scale": 0.5} | shape)),
    "exaone4": lambda **shape: Exaone4Config(**(_WINDOWS | shape)),
    "gemma3": lambda **shape: Gemma3TextConfig(
        **(_WINDOWS | {"head_dim": 32, "query_pre_attn_scalar": 32} | shape | {"tie_word_embeddings": True})
    ),
    # Its layers are known by other names, too, and have further inputs of their own.
    "gemma4": lambda **shape: Gemma4TextConfig(
        **(
            _WINDOWS
            | {"head_dim": 32, "global_head_dim": 32, "hidden_size_per_layer_input": 16}
            | {"vocab_size_per_layer_input": 256}
            | shape
            | {"tie_word_embeddings": True, "pad_token_id": 0}
        )
    ),
    "glm4": lambda **shape: Glm4Config(**({"head_dim": 32} | shape)),
    "granite": lambda **shape: GraniteConfig(
        **(
            {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.2,
                "logits_scaling": 2.0,
            }
            | shape
        )
    ),
    "olmo3": lambda **shape: Olmo3Config(**(_WINDOWS | shape)),
    # Positions beyond the first 64 are rotated by other factors.
    "phi3_longrope": lambda **shape: Phi3Config(
        **(
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}}
            | {"original_max_position_embeddings": 64}
            | shape
        )
    ),
    "qwen2_moe": lambda **shape: Qwen2MoeConfig(
        **(
            {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "num_experts": 4}
            | {"num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
            | shape
        )
    ),
    "seed_oss": lambda **shape: SeedOssConfig(**({"head_dim": 32} | shape)),
    "smollm3": lambda **shape: SmolLM3Config(**({"no_rope_layer_interval": 2} | shape)),
    "stablelm": lambda **shape: StableLmConfig(**shape),
    "starcoder2": lambda **shape: Starcoder2Config(**shape),
}
"""Families whose views are checked against the target itself."""

IN_TRANSFORMERS = {"olmo2", "olmo3", "seed_oss", "smollm3", "starcoder2"}
"""Those of vLLM's Transformers backend in 0.32; in 0.29 most are, and selfspec refuses it."""


def write_checkpoint(folder: Path, family: str = "llama", *, seed: int = 0, gain: float = 1.0, **shape: Any) -> Path:
    """Write a random float32 checkpoint of `family` into `folder` and return the folder.

    Args:
        folder: made if it is missing.
        family: a key of `FAMILIES` or `MORE_FAMILIES`.
        seed: of the weights; the same arguments always give the same weights.
        gain: scales the logits; larger means more peaked distributions.
        **shape: fields of the family's config, over the defaults `SHAPE`.
    """
    config = (FAMILIES | MORE_FAMILIES)[family](**(SHAPE | shape))
    config.dtype = "float32"
    build_model(config, seed, gain).save_pretrained(folder)
    return folder


def build_model(config: PretrainedConfig, seed: int, gain: float = 1.0) -> PreTrainedModel:
    """A model of `config` with weights drawn from `seed`, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed, gain)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int, gain: float = 1.0) -> None:
    """Draw new weights of `model` from `seed`, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1.0 + 0.1 * noise)
            if model.config.model_type == "olmo2" and "post_" in name:  # the only place where its layers have a say
                parameter.mul_(3.0 / (1 + extract_layer(name)))
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise)
        elif "embed_tokens" in name and not model.config.tie_word_embeddings:
            parameter.copy_(noise)
        else:
            if "lm_head" in name or "embed_tokens" in name:
                scale = 2.0 * gain
            elif "layers." in name and ("o_proj" in name or "down_proj" in name):
                scale = 3.0 / (1 + extract_layer(name))  # late layers say less, so that an early exit often agrees
            else:
                scale = 1.0
            parameter.copy_(scale / parameter[0].numel() ** 0.5 * noise)


def extract_layer(name: str) -> int:
    """The layer number in a parameter's name."""
    return int(name.split("layers.")[1].split(".")[0])
