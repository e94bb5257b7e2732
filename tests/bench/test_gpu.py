"""`benchmarks/gpu.py`: every row with tiny shapes on the CPU, and what becomes of rows that fail, hang or are there."""

import json

import pytest

from outside import run_program

NEED_CUDA = {"varlen", "liger", "fp8"}
EXPECTED = ["exact", "cached", "threshold", "batches", "graphs", "memory", "training", "recompute", "varlen", "liger"]
EXPECTED += ["fp8", "scoring", "server", "quantised", "processes"]

# One process that has imported everything runs all of it: the imports take longer than most rows.
DRIVER = """
import os
import sys
from pathlib import Path
from threading import Event

import gpu
import gpu_rows

folder = Path(sys.argv[1])
words = ["--cpu", "--output", str(folder / "gpu.json")]
codes = {"all": gpu.main(words)}
print("=====")
codes["again"] = gpu.main([*words, "--only", "memory", "--again"])
codes["there"] = gpu.main([*words, "--minutes", "0"])

def raises(at):
    raise RuntimeError("as injected")

def denies(at):
    return {"tokens as alone": False, "forwards/s": 1.0, "a way": {"failed": "as injected"}}

gpu_rows.row_raises, gpu_rows.row_denies = raises, denies
gpu_rows.row_hangs, gpu_rows.row_dies = lambda at: Event().wait(), lambda at: os.abort()
gpu.ROWS.update({name: gpu.Row(1, name) for name in ("raises", "denies", "dies", "hangs")})
words = ["--cpu", "--output", str(folder / "injected.json")]
codes["injected"] = gpu.main([*words, "--only", "raises", "denies", "dies"])
codes["hangs"] = gpu.main([*words, "--only", "hangs", "--minutes", "0.02"])
(folder / "codes.json").write_text(gpu.json.dumps(codes))
"""

# The rows that need CUDA, with stand-ins for its kernels: what they compute is not tested here, that they run is.
STAND_INS = """
import json
from functools import partial

import gpu_rows
from illada.model import attention
from illada.model.transformer import IlladaModel
from illada.training.optional import kernels

def varlen(query, key, value, ends_q, ends_k, most_q, most_k, *, window_size, enable_gqa):
    parts = [x.split(ends.diff().tolist()) for x, ends in ((query, ends_q), (key, ends_k), (value, ends_k))]
    heads = [[x[None].transpose(1, 2) for x in segment] for segment in zip(*parts)]
    out = [attention.F.scaled_dot_product_attention(*x, enable_gqa=enable_gqa)[0].transpose(0, 1) for x in heads]
    return gpu_rows.torch.cat(out)

attention.varlen_attn = varlen
gpu_rows.use_liger = kernels.use_liger = lambda model: None
kernels._try_liger = lambda device: None
gpu_rows.use_fp8 = kernels.use_fp8 = partial(kernels.use_fp8, emulate=True)
IlladaModel.compile_blocks = lambda self: None
print(json.dumps({name: getattr(gpu_rows, f"row_{name}")(gpu_rows.CPU) for name in ("varlen", "liger", "fp8")}))
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """The folder of the runs, and what they printed."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, run_program(DRIVER, str(folder)).stdout


def rows_of(file):
    return json.loads(file.read_text())["rows"]


@pytest.mark.slow
def test_every_row_runs_small_and_goes_on_where_it_is(driven):
    folder, printed = driven
    rows = rows_of(folder / "gpu.json")
    assert {row["row"]: (row["status"], row["reason"]) for row in rows} == {
        row["row"]: ("not measured", "needs CUDA") if row["row"] in NEED_CUDA else ("measured", "") for row in rows
    }
    assert [row["row"] for row in rows] == [*EXPECTED, "memory"]  # the second run took one row, the third none
    for row in rows:
        assert row.keys() >= {"seconds", "date", "device", "driver", "cuda", "torch", "versions", "commit"}
        assert "NO" not in row["figures"].values()
        assert row["row"] in NEED_CUDA or row["peak_gb"] > 0
    first = printed.partition("=====")[0]
    assert all(f"\n| {name} | what | " in first for name in EXPECTED)
    assert "|  | not measured | needs CUDA |  |  |" in first
    assert "a test of the code and no measurement" in first


@pytest.mark.slow
def test_what_happens_to_a_row_becomes_the_row(driven):
    folder, _ = driven
    rows = {row["row"]: row for row in rows_of(folder / "injected.json")}
    assert {row["status"] for row in rows.values()} == {"failed"}
    reasons = {name: row["reason"] for name, row in rows.items()}
    assert reasons == {
        "raises": "RuntimeError: as injected",
        "denies": "not so or not done: a way, tokens as alone",
        "dies": "the process ended with code -6",
        "hangs": "ended after 1 s",
    }
    assert "RuntimeError: as injected" in rows["raises"]["log"].splitlines()  # the traceback
    codes = json.loads((folder / "codes.json").read_text())
    assert codes == {"all": 0, "again": 0, "there": 0, "injected": 1, "hangs": 1}


@pytest.mark.slow
def test_rows_that_need_cuda_run_with_stand_ins():
    found = json.loads(run_program(STAND_INS).stdout.splitlines()[-1])
    for figures in found.values():
        assert False not in figures.values()
        assert not [way for way in figures.values() if isinstance(way, dict) and "failed" in way]
    assert {"windows, varlen", "documents, sdpa", "8 prompts, frozen, varlen", "sdpa", "varlen"} <= found[
        "varlen"
    ].keys()
    assert found["fp8"]["distance"]["states"] > 0
    assert found["fp8"]["fp8"]["kernels"].startswith("fused kernels: training.dtype fp8")
