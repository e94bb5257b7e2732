"""Helpers of the benchmarks: the machine in words, and the memory of this process."""

import os
import platform
from pathlib import Path

import torch


class NotHereError(Exception):
    """Something cannot be measured on this machine, which is no failure."""


def machine() -> str:
    """Return what timings depend on: torch, processor, threads and load."""
    return (
        f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}"
    )


def status(name: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS (resident), VmHWM (its peak), RssAnon (not of files)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
