"""`illada doctor`: what is installed here, what will be used, and why."""

import os
import platform
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from illada.devices import choose_device
from illada.reporting import commit
from illada.training.optional.kernels import trials

SHOWN = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "jsonargparse")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "RAY_ADDRESS")
NOT_FOR_USERS = ("dev", "docs")


def report() -> str:
    """Return what `illada doctor` prints: a line for each fact, under headings."""
    sections = {"versions": versions(), "machine": machine(), "in use": in_use(), "extras": extras()}
    lines = []
    for title, facts in sections.items():
        lines += [title, *(f"  {name:<18}{text}" for name, text in facts)]
    return "\n".join(lines)


def versions() -> Iterator[tuple[str, str]]:
    """Yield each package that matters, with its version, or what is wrong with it."""
    yield "illada", f"{metadata.version('illada')}, commit {commit() or 'unknown (no checkout)'}"
    yield "python", f"{platform.python_version()} at {sys.executable}"
    bounds = {need.name: need for need in map(Requirement, metadata.requires("illada") or []) if not need.marker}
    for name in SHOWN:
        yield name, _installed(bounds.get(name) or Requirement(name))


def machine() -> Iterator[tuple[str, str]]:
    """Yield system, cores, memory, disk and accelerators."""
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "cores", f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    yield "disk", f"{shutil.disk_usage('.').free / 1e9:.1f} GB free in this folder"
    cuda, rocm = torch.version.cuda, torch.version.hip
    yield "torch's build", f"for CUDA {cuda}" if cuda else f"for ROCm {rocm}" if rocm else "for CPUs only"
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        memory = f"{about.total_memory / 1e9:.0f} GB"
        yield f"GPU {number}", f"{about.name}, {memory}, capability {about.major}.{about.minor}"
    if cuda and not torch.cuda.is_available():
        yield "GPU", "none that torch can use: is there one, and a driver (nvidia-smi)?"
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def in_use() -> Iterator[tuple[str, str]]:
    """Yield the device and the kernels that will be used, and why others are not."""
    device = choose_device("auto")
    why = "there is no other" if device.type == "cpu" else "the fastest here; --device cpu takes the other"
    if device.type == "cpu" and torch.backends.mps.is_available():
        why = "Apple's GPU lacks float64, which sampling needs"
    yield "device", f"{device}: {why}"
    yield "attention", "SDPA; in training on CUDA also varlen"
    for name, problem in trials(device).items():
        yield name, problem or "works"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    yield "parallel.compile", f"has a compiler, {compiler}" if compiler else "no C++ compiler: it needs one"
    cache = Path(constants.HF_HUB_CACHE)
    yield "hub models", f"from {cache}{'' if cache.is_dir() else ' (not there yet)'}; the network only with a hub name"


def extras() -> Iterator[tuple[str, str]]:
    """Yield each extra: complete, or what is missing and how to install it."""
    needed = defaultdict(list)
    for need in map(Requirement, metadata.requires("illada") or []):
        for extra in metadata.metadata("illada").get_all("Provides-Extra") or []:
            if need.marker and not need.marker.evaluate({"extra": ""}) and need.marker.evaluate({"extra": extra}):
                needed[extra].append(need)
    for extra, needs in sorted(needed.items()):
        if extra in NOT_FOR_USERS:
            continue
        lacking = [f"{need.name} {_installed(need)}" for need in needs if not _fits(need)]
        remedy = f"{', '.join(lacking)}: pip install 'illada[{extra}]'"
        yield extra, remedy if lacking else ", ".join(f"{need.name} {metadata.version(need.name)}" for need in needs)


def _fits(need: Requirement) -> bool:
    try:
        return need.specifier.contains(metadata.version(need.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _installed(need: Requirement) -> str:
    try:
        found = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return "missing"
    return found if _fits(need) else f"{found}, but {need.specifier} is needed"
