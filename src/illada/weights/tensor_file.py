"""Writes safetensors files a tensor at a time: the library's own writer wants all tensors of a file in memory at once.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of the header, the header, a JSON
object of types, shapes and places, and then the tensors' bytes.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from xxhash import xxh3_128

from illada.errors import IlladaError
from illada.files import naming

INDEX = "model.safetensors.index.json"

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file; return its checksum when the disk has the file.

    Args:
        path: the file.
        tensors: what to write, by name; where `read` is given, only types and shapes count (they may be meta tensors).
        read: returns a tensor by its name, called once for each, in the order of the names; memory holds one at a time.
        metadata: texts for the header; None says that the tensors come from PyTorch.

    Raises:
        IlladaError: when a tensor has a type that the format does not know.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    # Wide types first, as the library does it, so that each lies at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise IlladaError(f"{name} has the type {tensor.dtype}, which cannot be written")
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxh3_128()
    with naming(path), path.open("wb", buffering=0) as file:

        def write(content: Any) -> None:
            digest.update(content)
            left = memoryview(content)
            while left:  # the system may write less than it is given
                left = left[file.write(left) :]

        write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name] if read is None else read(name)
            assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype), name
            write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            del tensor
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    max_shard_size: str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the weights of a model as transformers reads them: one file, or several with an index.

    Args:
        folder: of the model.
        tensors: types and shapes by name; they may be meta tensors.
        read: returns a tensor by its name.
        max_shard_size: largest file of weights.
        metadata: texts for the header of each file; None says that the tensors come from PyTorch.
    """
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, read, metadata)
    if plan.is_sharded:
        weight_map = dict(sorted(plan.tensor_to_filename.items()))
        content = {"metadata": plan.metadata, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class CheckpointWriter(HuggingFaceStorageWriter):
    """Writes the shard of each process as PyTorch's writer does, but without a second copy in memory.

    Attributes:
        sums: checksums of all shards by name, in the first process, once all have written.
    """

    sums: Mapping[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's part of the tensors into one file; its checksum travels with the results."""
        results: Future[list[WriteResult]] = Future()
        items = {item.index.fqn: item for item in plan.items}
        if not items:
            results.set_result([])
            return results
        name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
        tensors = {fqn: planner.resolve_data(item) for fqn, item in items.items()}
        offsets = {fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for fqn, item in items.items()}  # type: ignore[union-attr]
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
        digest = write_tensors(Path(self.path) / name, tensors, metadata=metadata)  # type: ignore[arg-type]
        indices = (item.index for item in items.values())
        results.set_result([WriteResult(index, 0, (name, digest)) for index in indices])
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        """Collect the checksums of all processes."""
        self.sums = dict(result.storage_data for of_process in results for result in of_process)
