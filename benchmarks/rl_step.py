"""Processor seconds of a reinforcement-learning cycle: ours beside dllm's GRPO trainer, on the same model and prompts.

    python benchmarks/rl_step.py --model runs/demo/model --dllm CHECKOUT --dllm_python VENV/bin/python
    python benchmarks/rl_step.py --model runs/demo/model --where

A cycle answers 16 sudokus six times each, judges the answers and makes four optimiser steps on them. Every answer has
32 tokens, one decided a pass (blocks of 16); ours are also timed as they are in use, ending where the model ends
them. Each program runs alone, on one thread, for one cycle and for three: half of the difference is a cycle, without
start and loading. No copy of the start is kept. Rounds alternate. Theirs needs the packages that dllm names and trl
0.19.1, and runs their LLaDA network on our weights (`illada export --layout released`).

`--where` says where the time of three of our cycles goes, by method, answers ending where the model ends them.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import reduce
from pathlib import Path

NAMES = {
    "model.transformer.wte.": "model.embed_tokens.",
    "model.transformer.ln_f.": "model.norm.",
    "model.transformer.blocks.": "model.layers.",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "attn_out": "self_attn.o_proj",
    **{f".{one}_proj": f".self_attn.{one}_proj" for one in "qkv"},
    "ff_proj": "mlp.gate_proj",
    ".up_proj": ".mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
"""LLaDA's names of tensors, and ours."""
METHODS = ("diffu-grpo", "espo", "gdsd")
PROMPTS, ANSWERS, INNER, TOKENS, BLOCK, ROWS = 16, 6, 4, 32, 16, 48


def theirs(model, checkout, problems, cycles):
    """Run so many cycles of dllm's trainer; this is what their interpreter runs."""
    from dllm_trainer import network

    shape = json.loads(Path(model, "config.json").read_text())
    model_of_theirs = network(checkout, shape)
    import torch
    import transformers
    from datasets import Dataset
    from dllm.pipelines.rl.grpo.rewards.sudoku import validate_sudoku_solution
    from dllm.pipelines.rl.grpo.trainer import DiffuGRPOConfig, DiffuGRPOTrainer
    from safetensors.torch import load_file

    weights = load_file(f"{model}/model.safetensors")
    with torch.no_grad():
        for theirs_name, tensor in model_of_theirs.state_dict().items():
            tensor.copy_(weights[reduce(lambda name, pair: name.replace(*pair), NAMES.items(), theirs_name)])
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)

    def reward(prompts, completions, **fields):
        said = ["".join(filter(str.isdigit, one[0]["content"])) for one in completions]
        return list(map(validate_sudoku_solution, said, fields["solution"], fields["puzzle"]))

    rows = [json.loads(line) for line in Path(problems).read_text().splitlines()]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "puzzle": row["puzzle"],
                "solution": row["answer"].replace("\n", ""),
            }
            for row in rows
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = DiffuGRPOConfig(
            output_dir=folder,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            max_steps=cycles * INNER,
            learning_rate=1e-5,
            num_generations=ANSWERS,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=PROMPTS * ANSWERS // ROWS,
            num_iterations=INNER,
            max_completion_length=TOKENS,
            max_prompt_length=None,
            steps=TOKENS,
            block_size=BLOCK,
            temperature=1.0,
            p_mask_prompt=0.15,
            beta=0.0,  # without LoRA their trainer loads its reference by a hub's name
            gradient_checkpointing=False,
            bf16=False,
        )
        trainer = DiffuGRPOTrainer(
            model=model_of_theirs, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
    count = trainer.state.num_input_tokens_seen
    print(f"{trainer.state.global_step} steps, {count} tokens of prompts and answers")


def ours(model, problems, method, whole, cycles, folder):
    """Return the command that runs so many cycles of ours; `problems` are the settings that say on which."""
    answers = {"block_length": BLOCK, "max_new_tokens": TOKENS, **({"logit_bias": {2: -1000}} if whole else {})}
    given = {
        "model.start": model,
        **problems,
        "data.window": 128,
        "rl.method": method,
        "rl.reward": "sudoku",
        "rl.answers": ANSWERS,
        "rl.inner_steps": INNER,
        "rl.hide_prompt": 0.15,
        "rl.beta": 0,
        "rl.settings": json.dumps(answers),
        "training.steps": cycles * INNER,
        "training.samples_per_step": PROMPTS * ANSWERS,
        "training.samples_per_batch": ROWS,
        "training.learning_rate": 1e-5,
        "training.checkpoint_every": 1000,
        "output": folder,
    }
    return [sys.executable, "-m", "illada", "rl", *(f"--{key}={value}" for key, value in given.items())]


def seconds(command):
    """Return the processor seconds of a command and its last line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, lines[-1]


class Clock:
    """Adds up processor seconds of calls, without those of other noted calls inside them."""

    def __init__(self):
        self.seconds, self.inside = {}, [0.0]

    def watch(self, owner, name, part):
        """Note the calls of a function or method under a part's name."""
        plain = getattr(owner, name)

        def noted(*args, **kwargs):
            begun = time.process_time()
            self.inside.append(0.0)
            try:
                return plain(*args, **kwargs)
            finally:
                whole = time.process_time() - begun
                self.seconds[part] = self.seconds.get(part, 0.0) + whole - self.inside.pop()
                self.inside[-1] += whole

        setattr(owner, name, noted)


def time_parts(model, method):
    """Run three cycles here, and print the processor seconds of their parts as JSON."""
    import torch

    from illada.cli import main as command_line
    from illada.post_training import answering, reinforcement, rewards
    from illada.post_training.problems import Problems
    from illada.training import trainer

    clock = Clock()
    clock.watch(answering, "generate", "answering")
    clock.watch(rewards.Judge, "__call__", "judging, waiting for it")
    clock.watch(Problems, "__getitem__", "drawing problems")
    clock.watch(reinforcement.RlTrainer, "sums", "views before the steps")
    clock.watch(reinforcement.RlTrainer, "pass_over", "views with gradient, forward")
    clock.watch(reinforcement, "objective", "loss")
    clock.watch(torch.Tensor, "backward", "backward")
    clock.watch(trainer, "update", "optimiser")
    clock.watch(reinforcement.RlTrainer, "train", "the rest: files, log, checkpoint, plans")
    with tempfile.TemporaryDirectory() as folder:
        command_line(ours(model, {"rl.tasks": '["sudoku"]'}, method, False, 3, f"{folder}/run")[3:])
    print(json.dumps(clock.seconds))


def where(model):
    """Print the processor seconds of the parts of a cycle; each method runs in a process of its own."""
    found = {}
    for method in METHODS:
        command = [sys.executable, __file__, "--model", model, "--method", method]
        found[method] = json.loads(seconds(command)[1])
    print("| part, processor seconds a cycle | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for part in max(found.values(), key=len):
        print(f"| {part} | " + " | ".join(f"{own.get(part, 0) / 3:.2f}" for own in found.values()) + " |")
    print("| all | " + " | ".join(f"{sum(own.values()) / 3:.2f}" for own in found.values()) + " |")


def main():
    """Read the command line, and time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dllm", help="a checkout of dllm")
    parser.add_argument("--dllm_python", help="the interpreter of an environment with what dllm needs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--theirs", nargs=3, help=argparse.SUPPRESS)  # model, problems, cycles; in their environment
    parser.add_argument("--where", action="store_true", help="the parts of our cycles")
    parser.add_argument("--method", help=argparse.SUPPRESS)  # the one that this process times
    options = parser.parse_args()
    if options.method:
        time_parts(options.model, options.method)
    elif options.where:
        where(options.model)
    elif options.theirs:
        model, problems, cycles = options.theirs
        theirs(model, options.dllm, problems, int(cycles))
    else:
        compare(options)


def timed(model, dllm, dllm_python, methods, rounds):
    """Time all ways in turn; return the processor seconds of a cycle of each round, by the name of the way.

    dllm's own comes first where `dllm` names its checkout; ours come by method and by length of the answers.
    """
    from illada.post_training.problems import Problems

    with tempfile.TemporaryDirectory() as folder:
        problems, released = f"{folder}/problems.jsonl", f"{folder}/released"
        drawn = Problems(["sudoku"], "", 0)
        Path(problems).write_text("".join(json.dumps(drawn[i]) + "\n" for i in range(PROMPTS * 8)))
        export = ["export", "--model", model, "--layout", "released", "--output", released]
        seconds([sys.executable, "-m", "illada", *export])
        ways = {
            f"ours, {method}, {'32 tokens' if whole else 'to the end of the answer'}": (method, whole)
            for method in methods
            for whole in (True, False)
        }
        names = [*(["dllm's GRPO, 32 tokens"] if dllm else []), *ways]
        taken = {name: [] for name in names}
        for number in range(rounds):
            for name in names:
                costs = []
                for cycles in (1, 3):
                    output = f"{folder}/{number}-{name.replace(' ', '-').replace(',', '')}-{cycles}"
                    if name in ways:
                        command = ours(model, {"data.train": problems}, *ways[name], cycles, output)
                    else:
                        command = [dllm_python, __file__, "--model", "-", "--dllm", dllm]
                        command += ["--theirs", released, problems, str(cycles)]
                    costs.append(seconds(command)[0])
                taken[name].append((costs[1] - costs[0]) / 2)
                print(f"{name}: {taken[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return taken


def compare(options):
    """Time all ways, and print a table."""
    taken = timed(options.model, options.dllm, options.dllm_python, METHODS, options.rounds)
    base = next(iter(taken.values()))
    print("| trainer | processor seconds a cycle, median (least to most) | the first over it |\n|---|---|---|")
    for name, found in taken.items():
        ratio = statistics.median(one / own for one, own in zip(base, found, strict=True))
        print(f"| {name} | {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) | {ratio:.1f} |")


if __name__ == "__main__":
    main()
