"""Every step on CPU gives its large temporaries back to the system and faults them in again, 4 KiB at a time.

Symptom: with 16 requests and three drafts each, at a vocabulary of 150,000, a cycle has 35,000 page faults, and
rejection sampling takes twice as long as without them (docs/measurements.md).
Cause: glibc's malloc maps whatever is larger than 32 MiB anew and unmaps it when it is freed; the logits and
probabilities of the drafts of a batch are.
Mend: once the model is loaded, freed memory up to 1 GiB stays with the process. Nothing where malloc is another
library's (tcmalloc keeps memory anyway).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """From now on, in this process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
