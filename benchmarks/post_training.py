"""Post-training on the demo's tasks: pairs to prefer, the noise of a preference score, accuracy and passes of models.

    python benchmarks/post_training.py pairs --model runs/demo/model --tasks sorting --problems 3000 --output P.jsonl
    illada prepare P.jsonl --kind preference --tokenizer runs/demo/model --output data/pairs
    illada dpo recipes/dpo.yaml --model.start runs/demo/model --data.train data/pairs --output runs/dpo --dpo.anchor 1
    python benchmarks/post_training.py noise --model runs/demo/model --tuned runs/dpo/model --pairs P.jsonl
    python benchmarks/post_training.py accuracy --models runs/demo/model runs/dpo/model --problems 500
    python benchmarks/post_training.py accuracy --models runs/demo/model runs/fast/model --thresholds 0.9
    python benchmarks/post_training.py published --data shared/data/reasoning --output P --chats 40000 --sudokus 1500
    python benchmarks/post_training.py accuracy --models runs/start runs/rl/model --files P/sudoku.jsonl
    python benchmarks/post_training.py forwards --runs runs/rl

`pairs` lets the model answer problems of the training split at temperature 1 and pairs a wrong answer of each with the
right one. `noise` measures the variance, over seeds, of (B_tuned - B_start)(chosen) - (B_tuned - B_start)(rejected).
`accuracy` answers held-out problems, or those of a file by their reward: right answers in percent, the difference to
the first row, paired by problem, and tokens a pass; of a file also the mean reward. `published` makes files of problems
of the published sudokus and Countdown problems, and writes conversations to tune a start on that have none of them.
`forwards` counts the answers that `illada rl` sent through the network: once for every pass of answering, once for
every view before the steps, and for every view of a step three times, since a gradient costs two passes more.
"""

import argparse
import csv
import json
import random
from itertools import product
from pathlib import Path

import numpy as np
import torch
import yaml

from illada import rng
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings, settings_for
from illada.post_training.bounds import Answer, AnswersObjective, Views
from illada.post_training.problems import Problems, countdown_problem, messages_of, read_problems, sudoku_problem
from illada.post_training.rewards import find_reward, reward_of
from illada.scoring.likelihood import views
from illada.text.chat import encode_prompt
from illada.toy_tasks import TASKS
from illada.weights.load import load_model

SETTINGS = {"max_new_tokens": 48, "block_length": 16}


def problems(task, count, held_out):
    """Return so many different problems of a task, of its training or its test split."""
    draw, found = random.Random(f"benchmark {task} {held_out}"), {}
    for _ in range(200 * count):
        example, tested = TASKS[task][0](draw)
        if tested == held_out:
            found.setdefault(example.prompt, example)
        if len(found) == count:
            break
    return [*found.values()]


def answers(model, tokenizer, examples, rows=None, **settings):
    """Return the model's answers to problems, `rows` at a time or as many as the engine takes."""
    chosen = settings_for(model, GenerationSettings(**SETTINGS, **settings))
    asked = [example.messages[:1] for example in examples]
    parts = [asked[i : i + rows] for i in range(0, len(asked), rows)] if rows else [asked]
    return [answer for part in parts for answer in generate(model, part, chosen, tokenizer)]


def make_pairs(options):
    """Write pairs of a right and a wrong answer."""
    model, tokenizer = load_model(options.model, "fp32", "cpu")
    lines, count = [], 0
    for task in options.tasks:
        examples = problems(task, options.problems, held_out=False)
        count += len(examples)
        for example, answer in zip(examples, answers(model, tokenizer, examples, temperature=1.0), strict=True):
            if answer.text.split() != example.answer.split() and answer.finish_reason == "stop":
                lines.append({"prompt": example.prompt, "chosen": example.answer, "rejected": answer.text})
    Path(options.output).write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines):,} pairs of {count:,} problems, whose other answers were right, in {options.output}")


def one_level(length, samples, seed, complementary):
    """Mask as `views` does, but so many times at one level."""
    count = min(length, 1 + int(rng.uniform_int(seed, 30) * length))
    rank = rng.uniform(seed, 31, torch.arange(samples)[:, None], torch.arange(length), dtype=torch.float64)
    masked = (rank.argsort(1).argsort(1) < count).numpy()
    return masked, np.full(samples, length / count / samples)


def drawn_levels(length, samples, seed, complementary):
    """Mask as `views` does, but each level is drawn by itself, as plain Monte Carlo does."""
    each = [views(length, 1, 100 * seed + number) for number in range(samples)]
    return np.concatenate([masked for masked, _ in each]), np.concatenate([weight for _, weight in each]) / samples


WAYS = {
    "n levels drawn one by one": (8, False, drawn_levels),
    "one level, n masks": (8, False, one_level),
    "n/2 levels with complements (complementary)": (4, True, views),
    "n levels of strata, tokens in turn (the default)": (8, False, views),
}


def measure_noise(options):
    """Print the variance of a preference score under each way to draw masks."""
    models = [load_model(name, "fp32", "cpu") for name in (options.model, options.tuned)]
    tokenizer = models[0][1]
    lines = [json.loads(line) for line in Path(options.pairs).read_text().splitlines()][: options.count]
    pairs = []
    for line in lines:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": line["prompt"]}])
        ends = ([*tokenizer.encode(line[name]), tokenizer.eos_token_id] for name in ("chosen", "rejected"))
        pairs.append([(np.array([*prompt, *end]), len(prompt)) for end in ends])
    print(f"{len(pairs)} pairs, {options.seeds} seeds, 8 views of an answer\n")
    print(
        "| masks | shared noise | tuned and start share it | independent | independent / shared, median (quartiles) "
        "| first row's independent / shared |"
    )
    print("|---|---|---|---|---|---|")
    plain = None
    for name, (samples, complementary, masks) in WAYS.items():
        bounds = np.zeros((2, len(pairs), 2, options.seeds))  # model, pair, answer, seed
        for number, seed in product(range(len(pairs)), range(options.seeds)):
            some = [Answer(ids, prompt, 1000 * seed + 7) for ids, prompt in pairs[number]]
            batch = Views.of(some, samples, complementary, masks)
            for place, (model, _) in enumerate(models):
                with torch.no_grad():
                    said = AnswersObjective(model.eval(), torch.device("cpu"), "fp32")(batch)
                bounds[place, number, :, seed] = batch.sums(said).numpy()
        gaps = bounds[1] - bounds[0]
        apart = np.roll(bounds, options.seeds // 2, -1)  # other seeds, in the same order
        third = np.roll(bounds, options.seeds // 4, -1)
        fourth = np.roll(bounds, options.seeds // 4 * 3, -1)
        shared = (gaps[:, 0] - gaps[:, 1]).var(-1, ddof=1)
        models_share = (gaps[:, 0] - np.roll(gaps[:, 1], 1, -1)).var(-1, ddof=1)
        independent = ((bounds[1, :, 0] - apart[0, :, 0]) - (third[1, :, 1] - fourth[0, :, 1])).var(-1, ddof=1)
        plain = independent if plain is None else plain
        ratio = np.percentile(independent / shared, [50, 25, 75])
        best = np.percentile(plain / shared, [50, 25, 75])
        means = (
            f"{values.mean():.3g} ± {values.std(ddof=1) / len(values) ** 0.5:.2g}"
            for values in (shared, models_share, independent)
        )
        ratios = (f"{middle:.3g} ({low:.3g} to {high:.3g})" for middle, low, high in (ratio, best))
        print(f"| {name} | {' | '.join(means)} | {' | '.join(ratios)} |")


def write_published(options):
    """Write sudoku.jsonl and countdown.jsonl, the published problems, and chats.jsonl, others with their answers."""
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with (options.data / "4x4_test_sudoku.csv").open() as file:
        tests = {"sudoku": [sudoku_problem(row["Puzzle"]) for row in csv.DictReader(file)]}
    lines = map(json.loads, (options.data / "countdown_cd3_test.jsonl").read_text().splitlines())
    tests["countdown"] = [countdown_problem([*map(int, x["input"].split(","))], int(x["output"])) for x in lines]
    for task, found in tests.items():
        (output / f"{task}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in found))
    excluded = [str(output / f"{task}.jsonl") for task in tests]
    counts = {"sudoku": options.sudokus, "countdown": options.chats - options.sudokus}
    chats = []
    for task, count in counts.items():
        drawn = Problems([task], "", options.seed, excluded)
        chats += [(drawn[i]["prompt"], drawn[i]["answer"]) for i in range(count)]
    roles = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in chats
    ]
    random.Random(options.seed).shuffle(roles)
    (output / "chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in roles))
    print(", ".join(f"{len(found)} of {task}" for task, found in tests.items()), f"and {len(roles):,} conversations")


def measure_files(options):
    """Print how many problems of each file are solved, and the mean reward."""
    print("| model | file | solved, % | beside the first | mean reward, % | tokens a pass |\n|---|---|---|---|---|---|")
    for path in options.files:
        found, first = read_problems(path), None
        reward = find_reward(reward_of(found[0]))
        for name in options.models:
            model, tokenizer = load_model(name, "fp32", "cpu")
            chosen = settings_for(model, GenerationSettings(**SETTINGS))
            said = generate(model, [messages_of(problem) for problem in found], chosen, tokenizer)
            scores = np.array([reward(problem, answer.text) for problem, answer in zip(found, said, strict=True)])
            right = 100 * (scores >= 1).astype(float)
            first = right if first is None else first
            error = right.std(ddof=1) / len(right) ** 0.5, (right - first).std(ddof=1) / len(right) ** 0.5
            rate = sum(len(a.ids) + 1 for a in said) / sum(a.forwards for a in said)
            beside = f"{(right - first).mean():+.1f} ± {error[1]:.1f}"
            solved = f"{right.mean():.1f} ± {error[0]:.1f}"
            print(f"| {name} | {path} | {solved} | {beside} | {100 * scores.mean():.1f} | {rate:.2f} |", flush=True)


def measure_accuracy(options):
    """Print accuracy and tokens a pass of each model and task."""
    tasks = options.tasks or list(TASKS)
    first = {}
    print(
        "| model | decoding | " + " | ".join(tasks) + " | all, tokens a pass |\n|---|---|" + "---|" * (len(tasks) + 1)
    )
    for name in options.models:
        model, tokenizer = load_model(name, "fp32", "cpu")
        for threshold in [None, *options.thresholds]:
            how = {} if threshold is None else {"threshold": threshold}
            how |= {"speculate": options.speculate} if options.speculate else {}
            cells, tokens, passes = [], 0, 0
            for task in tasks:
                examples = problems(task, options.problems, held_out=True)
                found = answers(model, tokenizer, examples, options.rows, **how)
                right = np.array([a.text.split() == e.answer.split() for a, e in zip(found, examples, strict=True)])
                own_tokens, own_passes = (sum(len(a.ids) + 1 for a in found), sum(a.forwards for a in found))
                tokens, passes = tokens + own_tokens, passes + own_passes
                own = first.setdefault(task, right)
                change = right.astype(float) - own
                error = change.std(ddof=1) / len(change) ** 0.5
                beside = "" if own is right else f" ({100 * change.mean():+.1f} ± {100 * error:.1f})"
                cells.append(f"{100 * right.mean():.1f}{beside}, {own_tokens / own_passes:.2f}")
            decoding = "one a pass" if threshold is None else f"threshold {threshold:g}"
            print(f"| {name} | {decoding} | " + " | ".join(cells) + f" | {tokens / passes:.2f} |", flush=True)


def count_forwards(options):
    """Print what each run of `illada rl` sent through the network, and what its answers were worth."""
    print(
        "| run | steps | thousand forwards: answering | views | their gradients | all | reward, first and last tenth |"
    )
    print("|---|---|---|---|---|---|---|")
    for run in options.runs:
        recipe = yaml.safe_load((Path(run) / "recipe.yaml").read_text())
        section, answered = recipe["rl"], recipe["training"]["samples_per_step"]
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "reward" in line]
        views = section["samples"] * (2 if section["complementary"] and section["method"] != "diffu-grpo" else 1)
        all_pull = section["beta"] or section["method"] == "gdsd"
        answering = seen = 0.0
        for line in lines:
            if (line["step"] - 1) % section["inner_steps"] == 0:
                answering += answered * line["answer_tokens"] * line["passes_per_token"]
            seen += views * answered * (1 if all_pull else 1 - line["zero_groups"])
        tenth = max(1, len(lines) // 10)
        rewards = [np.mean([line["reward"] for line in part]) for part in (lines[:tenth], lines[-tenth:])]
        parts = [answering, seen, 3 * seen, answering + 4 * seen]
        cells = " | ".join(f"{part / 1000:.1f}" for part in parts)
        print(f"| {run} | {lines[-1]['step']} | {cells} | {rewards[0]:.3f}, {rewards[1]:.3f} |")


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(required=True)
    pairs = parsers.add_parser("pairs")
    pairs.set_defaults(run=make_pairs)
    pairs.add_argument("--model", required=True)
    pairs.add_argument("--tasks", nargs="+", choices=TASKS, default=["sorting"])
    pairs.add_argument("--problems", type=int, default=2000, help="of each task")
    pairs.add_argument("--output", required=True)
    noise = parsers.add_parser("noise")
    noise.set_defaults(run=measure_noise)
    noise.add_argument("--model", required=True)
    noise.add_argument("--tuned", required=True)
    noise.add_argument("--pairs", required=True)
    noise.add_argument("--count", type=int, default=40)
    noise.add_argument("--seeds", type=int, default=64)
    accuracy = parsers.add_parser("accuracy")
    accuracy.set_defaults(run=measure_accuracy)
    accuracy.add_argument("--models", nargs="+", required=True)
    accuracy.add_argument("--tasks", nargs="+", choices=TASKS)
    accuracy.add_argument("--problems", type=int, default=500, help="of each task, or as many as it has")
    accuracy.add_argument("--thresholds", type=float, nargs="*", default=[])
    accuracy.add_argument("--speculate", type=int, default=0)
    accuracy.add_argument("--rows", type=int, help="so many problems at a time; speculation needs room beside them")
    accuracy.add_argument("--files", nargs="+", help="problems with a reward, in place of tasks")
    published = parsers.add_parser("published")
    published.set_defaults(run=write_published)
    published.add_argument("--data", type=Path, required=True, help="the folder of the two published files")
    published.add_argument("--output", required=True)
    published.add_argument("--chats", type=int, default=40000)
    published.add_argument("--sudokus", type=int, default=1500, help="of the conversations")
    published.add_argument("--seed", type=int, default=0)
    forwards = parsers.add_parser("forwards")
    forwards.set_defaults(run=count_forwards)
    forwards.add_argument("--runs", nargs="+", required=True)
    options = parser.parse_args()
    if getattr(options, "files", None):
        measure_files(options)
    else:
        options.run(options)


if __name__ == "__main__":
    main()
