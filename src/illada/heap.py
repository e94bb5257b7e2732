"""glibc's heap: a command keeps what is freed for its next pass, a server gives it back."""

import ctypes
import os
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""

LARGE = (64 * 2**20, 32 * 2**20)
"""Bytes from which a block is mapped by itself and goes back to the system at once: weights of large models. The first
that glibc takes: before 2.35 it takes no more than the second."""


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc; None under other C libraries."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Return free memory inside the heaps to the system: passes of changing sizes leave holes that would add up."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor.

    By default it returns the end of its heap after every pass, and the next pass waits while the system maps and
    zeroes the same pages anew: 19,000 page faults and 7 to 10 % of a training step at 1M parameters. Does nothing where
    the user has set glibc's own variables, and under other C libraries.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    set_option = _of_glibc("mallopt")
    # The trim threshold alone would do harm: once it is set, every block from 128 kB on stays mapped by itself.
    if set_option is not None and not chosen and any(set_option(M_MMAP_THRESHOLD, size) for size in LARGE):
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)
