"""What stands for others' samplers, and how the tests run the scripts in `benchmarks`."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# LLaDA's interface and order of work: all masks in view, `steps` divided over the blocks.
OUTSIDE = """
import torch

def generate(model, prompt, attention_mask=None, steps=8, gen_length=8, block_length=8, temperature=0.0,
             cfg_scale=0.0, remasking="low_confidence", mask_id=0):
    assert temperature == cfg_scale == 0 and remasking == "low_confidence" and steps == gen_length
    x = torch.cat((prompt, torch.full((1, gen_length), mask_id)), 1).to(model.device)
    for block in range(prompt.shape[1], x.shape[1], block_length):
        for _ in range(block_length):
            logits = model(x, attention_mask=attention_mask).logits
            p = logits.softmax(-1)
            p[..., mask_id] = -1
            best_p, best = p.max(-1)
            best_p[x != mask_id] = -1
            best_p[:, block + block_length:] = -1
            i = best_p[0].argmax()
            x[0, i] = best[0, i]
    return RESULT
"""


def run_program(program, *words):
    """Run a program that may import the scripts of `benchmarks`, on one thread; return the ended process."""
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=BENCHMARKS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done
