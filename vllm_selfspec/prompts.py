"""Prompt files: JSON lines, each with `prompt` (raw text) or `messages` (a chat, rendered by the model's template)."""

import importlib.resources
import json
from pathlib import Path
from typing import Any

from vllm_selfspec.errors import UsageError

_ROLES = ("system", "user", "assistant", "tool")


def embedded_prompts() -> list[dict[str, Any]]:
    """Return the prompts that ship with the package: short questions on maths, code and reasoning."""
    text = importlib.resources.files("vllm_selfspec").joinpath("data/prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def load_prompts(path: Path) -> list[dict[str, Any]]:
    """Read a prompt file; blank lines are skipped, fields other than `prompt` and `messages` are ignored.

    Returns:
        One dict per prompt, with exactly one of the keys `prompt` (str) and `messages` (list of role/content dicts).

    Raises:
        UsageError: when the file cannot be read or holds no prompts, or a line is malformed (its number is named).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"--prompts: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts: {path} cannot be read as UTF-8 text ({error})") from None
    prompts = [
        _check_line(line, f"--prompts: {path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not prompts:
        raise UsageError(
            f'--prompts: {path} holds no prompts; write one JSON object per line, such as {{"prompt": "Hi"}}'
        )
    return prompts


def _check_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise UsageError(f"{where}: needs a JSON object with exactly one of the fields prompt and messages")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"]:
            raise UsageError(f"{where}: prompt must be a text that is not empty")
        return {"prompt": record["prompt"]}
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: messages must be a list that is not empty")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise UsageError(f"{where}: messages[{position}].role must be one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UsageError(f"{where}: messages[{position}].content must be a text")
    return {"messages": messages}


def encode_prompt(tokenizer: Any, prompt: dict[str, Any]) -> list[int]:
    """Return the token ids of a prompt with the key `prompt` or `messages`.

    Raises:
        UsageError: when the model has no chat template for `messages`.
    """
    if "prompt" in prompt:
        return list(tokenizer.encode(prompt["prompt"]))
    if tokenizer.chat_template is None:
        raise UsageError("the model has no chat template; use prompt instead of messages in the prompts file")
    text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))
