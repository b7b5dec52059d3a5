"""Lossless self-speculative decoding for RL rollouts on stock vLLM.

Importing this package is free: neither torch, vLLM nor pydantic is imported before a name that needs them is used.
An installed but unused plugin must not slow down any Python process of the environment.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_selfspec.config import SelfSpecConfig

__version__ = "0.16.0"
__all__ = ["SelfSpecConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "SelfSpecConfig":
        from vllm_selfspec.config import SelfSpecConfig

        return SelfSpecConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
