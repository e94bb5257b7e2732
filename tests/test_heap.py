"""Freed memory stays with a command's process, unless its user has said otherwise."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from illada import heap

FAULTS = """
import resource
from illada.heap import keep_freed_memory
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [bytearray(b"x") * 2**20 for _ in range(8)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(); faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has this heap")
@pytest.mark.parametrize(
    ("call", "environment", "kept"),
    [
        ("", {}, False),
        ("keep_freed_memory()", {}, True),
        ("keep_freed_memory()", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ("keep_freed_memory()", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
    ],
)
def test_freed_memory_is_not_mapped_anew(call, environment, kept):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) < 500) == kept  # 8 MiB are 2,048 pages


@pytest.mark.parametrize(("most", "taken"), [(2**31, 64 * 2**20), (32 * 2**20, 32 * 2**20), (0, None)])
def test_the_trim_threshold_is_never_set_alone(monkeypatch, most, taken):
    """As glibc before 2.35 would do: it takes no more than 32 MiB, and then keeps its own 128 kB for good."""
    options = {}

    def mallopt(option, value):
        accepted = option == heap.M_TRIM_THRESHOLD or value <= most
        options.update({option: value} if accepted else {})
        return int(accepted)

    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(heap.sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    heap.keep_freed_memory()
    expected = {} if taken is None else {heap.M_MMAP_THRESHOLD: taken, heap.M_TRIM_THRESHOLD: 2**31 - 1}
    assert options == expected
