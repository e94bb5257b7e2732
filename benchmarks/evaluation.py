"""What does scoring cost? 256 mixed questions with four candidates each, through the harness's model: confidence (paper
Eq. 2) against the same one request at a time (by a plain loop as in public scripts, and by ours), the exact likelihood
of the paper's decoding (path), and the likelihood of 128 samples; processor seconds (of all threads), rows that went
through the network, and the matrix products of the confidence alone, with nothing between them: no way of computing the
same positions can be faster.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --model FOLDER

--model is a trained demo's. Questions are the demo's: 96 with lettered options (one-token answers), 96 with names of
modules, 64 whose answers are several words.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import machine
from lm_eval.api.instance import Instance
from torch.utils._python_dispatch import TorchDispatchMode

from illada.evaluation.harness import IlladaLM
from illada.evaluation.journal import Journal
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import score_layout
from illada.toy_tasks import held_out, library_choices


def questions() -> list[tuple[str, list[str]]]:
    """Return (context, candidates) of 256 questions, mixed."""
    items = []
    for choice in library_choices(96):
        options = "".join(f"\n{name}. {text}" for name, text in zip("ABCD", choice.candidates, strict=True))
        items.append((f"{choice.prompt}{options}\nAnswer:", [" A", " B", " C", " D"]))
        items.append((choice.prompt, list(choice.candidates)))
    items = items[:192]
    for task in ("capitals", "reversal", "shift", "sorting"):
        problems = held_out(task, 16)
        for place, problem in enumerate(problems):
            others = [problems[(place + step) % len(problems)].answer for step in (1, 2, 3)]
            items.append((problem.prompt, [problem.answer, *others]))
    # Kinds alternate, as tasks do in one evaluation.
    return [items[(59 * place) % len(items)] for place in range(len(items))]


@contextmanager
def rows_of(lm: IlladaLM) -> Iterator[list[int]]:
    """Count the sequences of every forward pass in the block."""
    lengths: list[int] = []
    plain = lm.model.model.packed

    def packed(ids_T: torch.Tensor, packing: Any, *rest: Any, **options: Any) -> torch.Tensor:
        lengths.extend(packing.lengths)
        return plain(ids_T, packing, *rest, **options)

    lm.model.model.packed = packed
    try:
        yield lengths
    finally:
        del lm.model.model.packed


@torch.inference_mode()
def one_at_a_time(lm: IlladaLM, requests: list[Instance]) -> list[float]:
    """Score by paper Eq. 2 as public evaluation scripts do: one request and one step at a time, with all logits."""
    mask, scores = lm.model.config.mask_token_id, []
    for request in requests:
        ((context, candidate),), right = score_layout(lm.tokenizer, request.args[0], [request.args[1]])
        ids = torch.tensor([[*context, *[mask] * len(candidate), *right]])
        place = torch.arange(len(context), len(context) + len(candidate))
        truth, masked, score = torch.tensor(candidate), torch.ones(len(candidate), dtype=torch.bool), 0.0
        while masked.any():
            logits = lm.model(input_ids=ids).logits[0].float()
            logits[:, mask] = -torch.inf  # as in ours, so that the scores compare
            log_p = logits.log_softmax(-1)[place, truth]
            best = int(log_p.masked_fill(~masked, -torch.inf).argmax())
            score += float(log_p[best])
            masked[best] = False
            ids[0, place[best]] = truth[best]
        scores.append(score)
    return scores


def ours_alone(lm: IlladaLM, requests: list[Instance]) -> list[float]:
    """Score by paper Eq. 2 with ours, one request at a time, so that nothing is shared between requests."""
    scores = []
    for request in requests:
        pairs, right = score_layout(lm.tokenizer, request.args[0], [request.args[1]])
        scores += confidence_scores(lm.model, pairs, right)
    return scores


class Recorded(TorchDispatchMode):
    """Notes the shapes of all linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.linear.default:
            self.shapes.append((len(args[0]), *args[1].shape))
        return func(*args, **(kwargs or {}))


def products_of(run: Callable[[], object]) -> Callable[[], object]:
    """Return a function that computes the matrix products of a run, of random numbers."""
    with Recorded() as recorded:
        run()
    assert recorded.shapes
    inputs = {(rows, width): torch.randn(rows, width) for rows, _, width in recorded.shapes}
    weights = {(out, width): torch.randn(out, width) for _, out, width in recorded.shapes}

    @torch.inference_mode()
    def products() -> None:
        for rows, out, width in recorded.shapes:
            torch.nn.functional.linear(inputs[rows, width], weights[out, width])

    return products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    lm = IlladaLM(args.model, dtype="fp32")
    requests = [
        Instance("loglikelihood", {}, (context, candidate), index, ("mixed", number, 1))
        for number, (context, candidates) in enumerate(questions())
        for index, candidate in enumerate(candidates)
    ]
    lengths = [len(score_layout(lm.tokenizer, r.args[0], [r.args[1]])[0][0][1]) for r in requests]

    def scored(scoring: str) -> list[float]:
        lm.scoring, lm.journal = scoring, Journal(None)
        return [score for score, _ in lm.loglikelihood(requests)]

    ways = {
        "confidence": lambda: scored("confidence"),
        "its matrix products alone": products_of(lambda: scored("confidence")),
        "confidence, one at a time by a plain loop": lambda: one_at_a_time(lm, requests),
        "confidence, one at a time by ours": lambda: ours_alone(lm, requests),
        "path": lambda: scored("path"),
        "likelihood, 128 samples": lambda: scored("likelihood"),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    rows, results = {}, {}
    for repeat, (way, run) in itertools.product(range(args.repeats), ways.items()):
        if repeat and way.startswith("likelihood"):
            continue
        with rows_of(lm) as counted:
            start = time.process_time()
            results[way] = run()
            seconds[way].append(time.process_time() - start)
        rows[way] = (len(counted), sum(counted))
    alone = [scores for way, scores in results.items() if way.startswith("confidence, one")]
    gap = max(abs(a - b) for scores in alone for a, b in zip(results["confidence"], scores, strict=True))
    assert gap < 1e-3, gap
    print(f"{machine()}; {len(requests)} candidates of {min(lengths)} to {max(lengths)} tokens")
    print(f"(mean {statistics.mean(lengths):.1f}); the three confidences differ by at most {gap:.1e} nats.\n")
    print("| scoring | seconds | × ours | rows | × ours | positions |\n|---|---|---|---|---|---|")
    for way in ways:
        pairs = zip(seconds[way], seconds["confidence"], strict=False)
        times = statistics.median(a / b for a, b in pairs)
        share = rows[way][0] / rows["confidence"][0]
        print(
            f"| {way} | {statistics.median(seconds[way]):.2f} | {times:.1f} | {rows[way][0]:,} | {share:.1f} | "
            f"{rows[way][1]:,} |"
        )
    nominal = sum(128 if length > 1 else 1 for length in lengths)
    print(
        f"\nWithout sharing, {sum(lengths):,} rows by confidence and {nominal:,} by likelihood: of the 128 masks of a"
    )
    print("short candidate many are the same, and sequences that look the same go through the network once.")


if __name__ == "__main__":
    main()
