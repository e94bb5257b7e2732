import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from illada.errors import IlladaError
from illada.folders import checksum
from illada.weights.tensor_file import INDEX, write_tensors, write_weights

TENSORS = {
    "b": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a": torch.arange(7),
    "half": torch.randn(4, 2).to(torch.bfloat16),
    "small": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def test_the_file_is_the_librarys(tmp_path):
    digest = write_tensors(tmp_path / "ours", TENSORS)
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    found, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == checksum(tmp_path / "ours")
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_tensor_at_a_time_is_asked_for(tmp_path):
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}
    asked = []
    write_tensors(tmp_path / "x", shapes, lambda name: (asked.append(name), TENSORS[name])[1])
    assert sorted(asked) == sorted(TENSORS)
    assert torch.equal(load_file(tmp_path / "x")["half"], TENSORS["half"])


def test_a_type_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(IlladaError, match=r"z has the type torch\.complex64"):
        write_tensors(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex64)})


def test_several_files_have_an_index(tmp_path):
    tensors = {f"layer.{n}": torch.full((100,), float(n)) for n in range(5)}
    write_weights(tmp_path, tensors, tensors.__getitem__, "1KB")
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2000
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
