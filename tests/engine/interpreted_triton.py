"""vLLM's model runner V2 on CPU: its Triton kernels run in Triton's interpreter, one program after the other.

vLLM wants a Triton that compiles for CPU; the interpreter needs none, and is fast enough for tiny models. The kernels
are the very ones that run on a GPU, and so are the runner, the sampler and the rejection sampler; for CUDA graphs see
`recorded_graph.py`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import emulated_cuda
import torch


def on_runner_v2() -> bool:
    """Whether the tests run on runner V2 and there is no GPU to do so."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" and not torch.cuda.is_available()


def wanted() -> bool:
    """Whether what the tests run needs Triton."""
    return on_runner_v2() or emulated_cuda.wanted()


def install() -> None:
    """Call before vLLM is imported."""
    os.environ["TRITON_INTERPRET"] = "1"

    import numpy as np
    from triton import backends
    from triton import language as tl
    from triton.language.core import tensor
    from triton.language.extra import libdevice
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    # What vLLM looks for before it believes that Triton works on a CPU.
    backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

    # Kernels may mask with integers, which the compiler takes and the interpreter does not.
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def truth(mask: TensorHandle) -> TensorHandle:
        return TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    def masked_load(self: Any, pointers: Any, mask: TensorHandle, *rest: Any) -> TensorHandle:
        return load(self, pointers, truth(mask), *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: TensorHandle, *rest: Any) -> None:
        store(self, pointers, value, truth(mask), *rest)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store

    # Products of bfloat16, which the interpreter keeps as the 16 bits that it is and would multiply as whole numbers.
    dot = InterpreterBuilder.create_dot

    def wide(values: TensorHandle) -> TensorHandle:
        if values.dtype.scalar != tl.bfloat16:
            return values
        return TensorHandle((values.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def bfloat16_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, wide(a), wide(b), *rest)

    InterpreterBuilder.create_dot = bfloat16_dot

    # Of the device's library, which is not there, the sampler uses one function.
    def log1p(x: tensor) -> tensor:
        with np.errstate(divide="ignore", invalid="ignore"):
            return tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)

    libdevice.log1p = log1p

    # Twice as fast: the language's functions are replaced by interpreted ones once and for all, not for every call of a
    # kernel or of a function in it, and no integer operation is done again in 64 bits to look for overflows.
    patch_language = interpreter._patch_lang
    patched: set[frozenset[int]] = set()

    def patch_once(function: Any) -> SimpleNamespace:
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules not in patched:
            patch_language(function)
            patched.add(modules)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
