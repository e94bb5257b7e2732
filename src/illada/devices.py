"""Devices by name, types of weights by name, and peak memory."""

import resource
import sys

import torch

from illada.errors import IlladaError

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Types of weights by name; auto is the type in the checkpoint."""


def choose_device(name: str) -> torch.device:
    """Return the device of a name; auto chooses a GPU where there is one.

    Raises:
        IlladaError: when the device cannot be used here.
    """
    if name != "auto":
        try:
            place = torch.zeros(1, device=name)
            place.item()  # "meta" holds no numbers
            return place.device
        except Exception as error:
            raise IlladaError(f"device {name} cannot be used here: choose cpu or auto") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    # Apple's GPU lacks float64, which sampling needs, and bf16 autocast for some operations used here.
    return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else accelerator


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes in use so far: allocated on a GPU, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
