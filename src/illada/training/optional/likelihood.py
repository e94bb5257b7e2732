"""Bits per byte of held-out text by exact likelihood, beside the bound on the same windows.

The bound of validation is an upper bound on the negative log-likelihood, and a causal model's figure is that itself. A
path likelihood (`illada.scoring.path`) is exact as well, so with it the two kinds of model compare. It costs as many
passes as a window has tokens, hence the sample.

Shape letters: N windows.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.files import write_json
from illada.generation.settings import GenerationSettings
from illada.model.transformer import IlladaForMaskedLM
from illada.reporting import aligned
from illada.scoring.layout import Pair
from illada.scoring.likelihood import likelihood_scores
from illada.scoring.path import path_log_likelihoods
from illada.text.tokenizer import load_tokenizer, tokenizer_sha256
from illada.training.validation import VALIDATION_SEED, bits_per_byte
from illada.weights.load import load_model
from illada.weights.runs import RECIPE, STATE, model_folder, read_metrics, read_recipe, read_state

RESULT = "likelihood.json"
MASKS = 128
"""Samples of the bound for each window, as in LLaDA's likelihood."""

Figure = dict[str, float | None]
"""The mean over windows in bits per byte, and its standard_error; None for a single window."""


@dataclass(frozen=True)
class TextLikelihood:
    """Bits per byte of sampled windows; every figure is of the same tokens, those after the first of each window."""

    windows: int
    tokens: int
    """Tokens that are predicted, of all windows together."""
    figures: dict[str, Figure]
    """By name: "bound" and "path", and "path - bound", paired; or "exact" of a causal model."""


def held_out_pairs(shards: Shards, window: int, windows: int) -> list[Pair]:
    """Return the first token and the rest of `windows` windows, spread evenly over the data as in validation.

    The first token is given, because nothing predicts it in a causal model.

    Raises:
        IlladaError: when the data have no window of two tokens, or fewer than one is asked for.
    """
    length = min(window, shards.tokens)
    if length < 2 or windows < 1:
        raise IlladaError(f"{windows} windows of {length} tokens: the likelihood needs one of two tokens at least")
    whole = max(1, shards.tokens // window)
    count = min(windows, whole)
    texts = (shards.read(i * whole // count * window, length).tolist() for i in range(count))
    return [(ids[:1], ids[1:]) for ids in texts]


def text_likelihood(
    model: IlladaForMaskedLM,
    shards: Shards,
    window: int,
    windows: int,
    block_length: int = GenerationSettings.block_length,
    max_batch_tokens: int = 4096,
) -> TextLikelihood:
    """Return the path likelihood of held-out text and the bound on it; of a causal model its exact likelihood.

    The path is that of the paper's decoding: blocks, one token a pass. The bound has `MASKS` masks for each window
    (LLaDA Eq. 6), with the seed of validation; its standard error holds their noise.

    Args:
        model: the network.
        shards: held-out text.
        window: tokens of a window, the first of which is given.
        windows: most windows; the data may have fewer.
        block_length: of the decoding rule.
        max_batch_tokens: most positions of one forward pass.

    Raises:
        IlladaError: when there is no window, or the text holds the mask token.
    """
    pairs = held_out_pairs(shards, window, windows)
    length = len(pairs[0][1])
    scale = bits_per_byte(1.0, shards.tokens, shards.bytes)
    bound_N = np.array(likelihood_scores(model, pairs, MASKS, VALIDATION_SEED, (), max_batch_tokens)) / -length * scale
    figures = {"exact": bound_N}
    if not model.config.causal:
        rule = GenerationSettings(block_length=block_length, eos_token_id=None)
        path_N = np.array(path_log_likelihoods(model, pairs, rule, (), max_batch_tokens)) / -length * scale
        figures = {"bound": bound_N, "path": path_N, "path - bound": path_N - bound_N}
    return TextLikelihood(
        len(pairs), len(pairs) * length, {name: _figure(values_N) for name, values_N in figures.items()}
    )


def _figure(values_N: NDArray[np.float64]) -> Figure:
    error = float(values_N.std(ddof=1)) / math.sqrt(len(values_N)) if len(values_N) > 1 else None
    return {"mean": float(values_N.mean()), "standard_error": error}


def run_likelihood(run: str, windows: int, beside: str | None = None) -> dict[str, Any]:
    """Measure the model of a run on its held-out text, write likelihood.json into the run, and return its contents.

    Args:
        run: folder of the run; its finished model, or the newest checkpoint.
        windows: how many windows of the recipe's length.
        beside: another model or run, measured on the same windows, such as a causal one.

    Raises:
        IlladaError: when the run names no held-out text, a model cannot be loaded, or tokenizers differ.
    """
    recipe = Path(run) / RECIPE
    if not recipe.is_file():
        raise IlladaError(f"{run} holds no {RECIPE}: give the folder of a run")
    data = read_recipe(recipe)["data"]
    if not data["validation"]:
        raise IlladaError(f"{run} has no held-out text: its recipe names no data.validation")
    shards = Shards.open(data["validation"])
    checkpoint = model_folder(run).parent  # if the weights are those of one
    logged = [record["step"] for record in read_metrics(Path(run) / "metrics.jsonl")]
    results: dict[str, Any] = {
        "step": read_state(checkpoint).step if (checkpoint / STATE).is_file() else max(logged, default=0),
        "block_length": GenerationSettings.block_length,
        "masks": MASKS,
    }
    names = [name for name in (run, beside) if name is not None]
    for name in names:  # before anything is measured
        if shards.tokenizer_sha256 not in ("", tokenizer_sha256(load_tokenizer(model_folder(name)))):
            raise IlladaError(f"{name} has another tokenizer than {data['validation']}: their figures do not compare")
    for name in names:
        model, _ = load_model(name)
        found = text_likelihood(model, shards, data["window"], windows)
        results |= {"windows": found.windows, "tokens": found.tokens}
        results.setdefault("models", {})[name] = found.figures
    write_json(Path(run) / RESULT, results)
    return results


def likelihood_table(results: dict[str, Any]) -> str:
    """Return what `run_likelihood` found, as Markdown."""
    names = ("bound", "path", "path - bound", "exact")
    lines = [["bits per byte ± standard error", *names]]
    for model, figures in results["models"].items():
        lines.append([model, *(_cell(figures[name]) if name in figures else "" for name in names)])
    said = (
        f"{results['tokens']:,} held-out tokens in {results['windows']} windows; path: the exact likelihood of blocks "
        f"of {results['block_length']}, one token a pass; bound: {results['masks']} masks a window; exact: causal"
    )
    return f"{said}\n\n{aligned(lines)}"


def _cell(figure: Figure) -> str:
    error = figure["standard_error"]
    return f"{figure['mean']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
