"""Tiny random checkpoints of models that see images, and what vLLM needs to run them without torchvision."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, randomize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)
from vllm import ModelRegistry

START, IMAGE, END, VIDEO = range(252, 256)
"""Token ids around and in place of an image, as Qwen's models have them."""
SPECIAL = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
TOKENS = {"vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO}
TEXT = SHAPE | {"head_dim": 32}


def _qwen_vision(**more: Any) -> dict[str, Any]:
    shape = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128}
    return shape | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2} | more


VISION: dict[str, Callable[[], PretrainedConfig]] = {
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**SHAPE),
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=28
        ).to_dict()
        | {"patch_size": 14},
        image_token_index=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        vision_config=_qwen_vision(fullatt_block_indexes=[1]),
        **TOKENS,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
        vision_config=_qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        **TOKENS,
    ),
}
"""Families with images; those of Qwen have M-RoPE."""

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def write_vision_checkpoint(folder: Path, family: str, seed: int = 0) -> Path:
    """Write a random float32 checkpoint of `family`, a key of `VISION`, with a tokenizer; returns the folder."""
    config = VISION[family]()
    config.dtype = "float32"
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    model.save_pretrained(folder)
    if family == "llava":  # vLLM knows the parts of CLIP by their names of before transformers 5
        path = folder / "model.safetensors"
        weights = {
            re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): weight
            for name, weight in load_file(path).items()
        }
        save_file(weights, path, {"format": "pt"})
    names = [*(f"t{i}" for i in range(START)), *SPECIAL]
    words = WordLevel({name: i for i, name in enumerate(names)}, "t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIAL)
    fast.save_pretrained(folder)
    if family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        LlavaProcessor(
            CLIPImageProcessorPil(**sizes),
            fast,
            patch_size=14,
            vision_feature_select_strategy="default",
            image_token=SPECIAL[1],
            num_additional_image_tokens=1,
        ).save_pretrained(folder)
    return folder


def picture(height: int, width: int, seed: int) -> Image.Image:
    """A random image; those of Qwen's models make a token of every 28 by 28 pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Lets vLLM take these models, whose files import torchvision, and prepare images for Qwen's by Pillow.

    A machine for the tests has no torchvision: there is none for torch on CPU among the packages.
    """
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    names.append(f"{names[-1]}.functional")
    with pytest.MonkeyPatch.context() as patch:
        for name in reversed(names):
            patch.setitem(sys.modules, name, stand_in := ModuleType(name))
            if name.endswith("v2"):
                stand_in.functional = sys.modules[names[-1]]
        modules = {family: importlib.import_module(f"vllm.model_executor.models.{family}") for family in VISION}
    with pytest.MonkeyPatch.context() as patch:
        for family, module in modules.items():
            architecture = ARCHITECTURES[family]
            ModelRegistry.register_model(architecture, getattr(module, architecture))
            if family.startswith("qwen"):
                _prepare_images_by_pillow(module, architecture.removesuffix("ForConditionalGeneration"), patch)
        yield


def _prepare_images_by_pillow(module: Any, name: str, patch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    kind = getattr(module, f"{name}Processor")
    # It has none for videos, which needs torchvision.
    images_only = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: object})

    def get_hf_processor(self: Any, **_: Any) -> Any:
        if not hasattr(self, "_images_only"):
            size = {"shortest_edge": 28 * 28, "longest_edge": 168 * 168}
            images = Qwen2VLImageProcessorPil(patch_size=14, size=size)
            videos = SimpleNamespace(size=size, patch_size=14, temporal_patch_size=2, merge_size=2)
            self._images_only = images_only(images, self.get_tokenizer(), videos)
        return self._images_only

    info = getattr(module, f"{name}ProcessingInfo")
    patch.setattr(info, "get_hf_processor", get_hf_processor)
    patch.setattr(info, "get_supported_mm_limits", lambda self: {"image": None})
    scopes: dict[str, set[str]] = {"images_kwargs": set(), "videos_kwargs": set()}
    patch.setattr(info, "get_supported_mm_processor_kwargs", lambda self: scopes)
