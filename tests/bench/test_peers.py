"""`benchmarks/peers.py`: a peer that runs, that fails, that is late, and that has no path, each as its row."""

import json

import pytest

from illada.weights.save import write_model
from outside import OUTSIDE, run_program

WRONG = "torch.cat((prompt, (x[:, prompt.shape[1]:] + 1) % mask_id), 1)"
"""Other answers than ours."""
# A score that is not ours.
LIKELIHOOD = """
def get_log_likelihood(model, prompt, answer, mc_num, batch_size, mask_id):
    return -1.0
"""

# One process that has imported everything runs all of it, on the task whose problems are drawn soonest.
DRIVER = """
import json
import sys

import peers

peers.peers_rows.TASKS = ("reversal",)
runs = map(json.loads, sys.argv[1:])
codes = []
for words in runs:
    print("=====")
    codes.append(peers.main(words))
print("=====")
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def model(build_model, tiny_tokenizer, tmp_path_factory):
    """A tiny random model with room for the demo's prompts."""
    folder = tmp_path_factory.mktemp("peers") / "model"
    network = build_model(True, 1, vocab_size=len(tiny_tokenizer), max_position_embeddings=512)
    tensors = {name: t for name, t in network.state_dict().items() if name != "lm_head.weight"}
    write_model(folder, folder, network.config, tensors, network.dtype, "", tokenizer=tiny_tokenizer)
    return folder


def checkout(folder, **files):
    """Write files, named with __ for the folders between, and return the folder."""
    for name, text in files.items():
        file = folder / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def program(file, line):
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return file


def run(*runs):
    """Run the benchmark with these words, one run after the other; return what each printed, errors, and the codes."""
    done = run_program(DRIVER, *map(json.dumps, runs))
    *said, codes = done.stdout.split("=====\n")[1:]
    return said, done.stderr, json.loads(codes)


REFUSED = {
    "--model nowhere": "--model nowhere holds no config.json: give a model's folder",
    "--model MODEL --fast_dllm .": "--fast_dllm . holds no llada/generate.py: give a checkout",
    "--model MODEL --dllm .": "--dllm CHECKOUT and --dllm_python PYTHON go together",
    "--model MODEL --llama_cpp nowhere": "--llama_cpp nowhere is no program: give a Python interpreter",
    "--model MODEL --rounds 0": "--rounds must be at least 1, got 0",
}
BEFORE_REFUSED = 4


@pytest.fixture(scope="module")
def driven(model, tmp_path_factory):
    """The file of three runs, and what all runs printed, wrote as errors, and returned."""
    folder = tmp_path_factory.mktemp("peers")
    same = checkout(folder / "same", generate=OUTSIDE.replace("RESULT", "x"), get_log_likelihood=LIKELIHOOD)
    other = checkout(folder / "other", generate=OUTSIDE.replace("RESULT", WRONG), get_log_likelihood=LIKELIHOOD)
    hangs = checkout(folder / "hangs", llada__generate="from threading import Event\nEvent().wait()")
    dllm = checkout(folder / "dllm", dllm__core__trainers__mdlm="")
    fails = program(folder / "python", "echo no such module >&2; exit 1")
    common = ["--model", str(model), "--limit", "2", "--rounds", "1", "--output"]
    output = folder / "up" / "peers.json"
    ran = run(
        [*common, str(output)],
        [*common, str(output), "--authors", str(same), "--dllm", str(dllm), "--dllm_python", str(fails)],
        [*common, str(output), "--fast_dllm", str(hangs), "--minutes", "0.001"],
        [*common, str(folder / "other.json"), "--authors", str(other)],
        *(words.replace("MODEL", str(model)).split() for words in REFUSED),
    )
    return output, *ran


@pytest.mark.slow
def test_whatever_happens_to_a_peer_is_its_row(driven):
    output, said, errors, codes = driven
    assert codes[:BEFORE_REFUSED] == [0, 1, 1, 0]
    nothing, two, late, wrong = (
        [line for line in text.splitlines() if line.startswith("| ")][1:] for text in said[:BEFORE_REFUSED]
    )
    assert nothing == [
        "| LLaDA's code | not run: --authors CHECKOUT | | | | |",
        "| Fast-dLLM | not run: --fast_dllm CHECKOUT | | | | |",
        "| dInfer | not run: --dinfer CHECKOUT | | | | |",
        "| dllm | not run: --dllm CHECKOUT --dllm_python PYTHON | | | | |",
        "| llama.cpp | not run: --llama_cpp PYTHON | | | | |",
    ]
    assert two[0].startswith("| LLaDA's code | one token a pass, no cache; ours, on behind the end as theirs | ")
    assert [line.partition("; passes")[0].rpartition("| ")[2] for line in two[:3]] == ["2 of 2 answers equal"] * 3
    assert all("means -1.00 and -" in line for line in two[3:5])
    assert two[5:7] == nothing[1:3]
    assert two[7].startswith("| dllm | failed: ")
    assert "exit status 1" in two[7]
    assert late[:5] == two[:5]  # what the file holds stays in the table
    assert late[5] == "| Fast-dLLM | failed: ended after 1 s | | | | |"
    assert [line.partition("; passes")[0].rpartition("| ")[2] for line in wrong[:3]] == ["0 of 2 answers equal"] * 3
    rows = json.loads(output.read_text())["rows"]
    assert [(row["row"], row["status"]) for row in rows] == [
        ("authors", "measured"),
        ("dllm", "failed"),
        ("fast_dllm", "failed"),
    ]
    assert "no such module" in rows[1]["log"]
    assert "dllm: failed: " in errors


@pytest.mark.slow
def test_bad_input_is_one_line_and_code_2(driven):
    _, said, errors, codes = driven
    assert codes[BEFORE_REFUSED:] == [2] * len(REFUSED)
    assert "".join(said[BEFORE_REFUSED:]) == ""
    assert errors.splitlines()[-len(REFUSED) :] == [f"peers.py: {reason}" for reason in REFUSED.values()]
    assert errors.count("peers.py: ") == len(REFUSED)
