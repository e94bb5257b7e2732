"""What a recipe names, opened and checked: data, shape and weights of the network."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from illada.data.batches import Batches
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.model import IlladaConfig, IlladaForMaskedLM
from illada.text.tokenizer import load_tokenizer, tokenizer_sha256
from illada.training.checkpoint import RunState
from illada.training.recipe import LORA_TARGETS, ModelRecipe, Recipe
from illada.training.schedule import Schedule
from illada.weights.adapters import CONFIG, add_adapter, is_adapted
from illada.weights.load import load_config, load_model

DROPOUTS = ("attention_dropout", "resid_pdrop", "residual_dropout", "embedding_dropout")
"""What iLLaDA's and LLaDA's config.json call their dropouts."""


def open_validation(path: str, train_shards: Shards) -> Shards:
    """Open held-out data that must come from the tokenizer of the training data.

    Raises:
        IlladaError: when it does not, or holds nothing.
    """
    shards = Shards.open(path)
    if not shards.tokens:
        raise IlladaError(f"{path} holds no tokens: prepare some text to validate on")
    if shards.tokenizer_sha256 != train_shards.tokenizer_sha256:
        raise IlladaError(
            f"{path} was prepared with another tokenizer than {train_shards.path}: prepare both with the same one"
        )
    return shards


def shape_of(recipe: ModelRecipe, start: Path | None, shards: Shards, tokenizer: Any) -> IlladaConfig:
    """Return the network's shape: the checkpoint's, or the preset's with the tokenizer's vocabulary and ids.

    Raises:
        IlladaError: when the tokenizer does not fit, or `start` is an adapter.
    """
    if start is not None:
        if (start / CONFIG).is_file():
            raise IlladaError(
                f"{recipe.start} is an adapter: merge it with `illada export --model {recipe.start} --output FOLDER` "
                "and start from that folder"
            )
        config = load_config(start)
        theirs = load_tokenizer(start)
        if tokenizer_sha256(theirs) != shards.tokenizer_sha256:
            raise IlladaError(
                f"{shards.path} was prepared with another tokenizer than that of {recipe.start}: "
                f"prepare it again with --tokenizer {recipe.start}"
            )
        return config
    assert recipe.preset is not None
    if tokenizer.mask_token_id is None:
        raise IlladaError(f"the tokenizer of {shards.path} has no mask token: add one and prepare the data again")
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("mask", "bos", "eos", "pad")}
    return IlladaConfig.preset(recipe.preset, **{**recipe.changes(), "vocab_size": shards.vocab_size, **ids})


def make_batches(recipe: Recipe, shards: Shards, config: IlladaConfig, eos_token_id: int | None) -> Batches:
    """Return the training set as a function of the step.

    Raises:
        IlladaError: when a window is longer than the context, or the data does not fill one.
    """
    data, training = recipe.data, recipe.training
    if data.window > config.max_position_embeddings:
        raise IlladaError(
            f"data.window {data.window} is longer than the model's context {config.max_position_embeddings}: "
            "lower it or raise model.max_position_embeddings"
        )
    return Batches(
        shards,
        window=data.window,
        samples_per_step=training.samples_per_step,
        seed=training.seed,
        split_probability=data.split_probability,
        boundaries=data.boundaries,
        rule=training.rule,
        eos_token_id=eos_token_id,
    )


def build_model(recipe: Recipe, start: Path | None, config: IlladaConfig) -> IlladaForMaskedLM:
    """Build the network with initial weights of the seed, or load the one to start from, in fp32 on the CPU.

    Weights that stay frozen under an adapter keep their own type, unless the computation is to be in fp32.
    """
    lora = recipe.lora
    if start is not None:
        own = bool(lora.rank) and recipe.training.dtype == "bf16"
        model, _ = load_model(str(start), "auto" if own else "fp32", "cpu")
    else:
        # fork_rng: the seed must not leak into the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            model = IlladaForMaskedLM(config)
    if lora.rank:
        given = recipe.model.start
        assert given is not None
        base = os.path.abspath(start) if start is not None and Path(given).exists() else given
        alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
        targets = lora.targets or LORA_TARGETS
        add_adapter(model, lora.rank, alpha, lora.dropout, targets, base, recipe.training.seed)
    return model


def schedule_of(recipe: Recipe, batches: Batches, state: RunState) -> Schedule:
    """Return the learning rates of a run, given when its decay was begun."""
    training = recipe.training
    steps = training.steps
    if steps is None:
        assert training.epochs is not None
        steps = max(1, round(training.epochs * batches.samples / training.samples_per_step))
    decay_steps = steps // 10 if training.decay_steps is None else min(training.decay_steps, steps)
    start = steps - decay_steps if state.decay_start is None else min(state.decay_start, steps - decay_steps)
    rates = (training.learning_rate, training.final_learning_rate)
    return Schedule(*rates, training.warmup_steps, training.decay, decay_steps, start)


def remarks(recipe: Recipe, start: Path | None, model: IlladaForMaskedLM) -> list[str]:
    """Return what a user should know before the run begins."""
    lines = []
    if start is not None:
        written = json.loads((start / "config.json").read_text())
        unused = [f"{name} {written[name]}" for name in DROPOUTS if written.get(name)]
        if unused:
            lines.append(f"{start} asks for {', '.join(unused)}: trained without, as this network has no dropout")
    if is_adapted(model):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in model.parameters())
        lines.append(f"an adapter of {trained:,} parameters beside {everything - trained:,} frozen ones")
        if (rate := recipe.training.learning_rate) <= 2e-5:  # ours: between what is usual for weights and for adapters
            lines.append(f"training.learning_rate {rate:g} suits all weights: adapters want ten times as much or more")
    return lines
