"""A compiled model is never loaded from vLLM's cache on CPU in vLLM 0.32.

Symptom: every start compiles for one to two minutes per graph and logs "Compiling model again due to a load failure
[...] 'function' object has no attribute 'finalize_loading'" (or another type's name).
Cause: `_try_load_aot_compiled_fn` finalizes what it loaded as vLLM's own backend needs it. The CPU platform compiles
with torch's Inductor backend, whose loaded function is complete and has no such method.
Mend: a loaded function without `finalize_loading` gets one that does nothing. vLLM's checks of the cache key and of
the traced sources stay as they are. Goes when vLLM asks before it calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch


def try_load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`_try_load_aot_compiled_fn`, with every loaded function ready to be finalized."""
    load = torch.compiler.load_compiled_function

    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda vllm_config: None
        return loaded

    with patch.object(torch.compiler, "load_compiled_function", load_compiled_function):
        return original(*args, **kwargs)
