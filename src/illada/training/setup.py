"""A run opened: the data, tokenizer, network and optimisers that a recipe names, read and checked once."""

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illada.data.batches import Batches
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.model import IlladaConfig, IlladaForMaskedLM
from illada.text.tokenizer import load_tokenizer, tokenizer_sha256
from illada.training.optim import make_optimizers, moments
from illada.training.optional.checkpoint_hook import CheckpointHook
from illada.training.optional.kernels import CROSS_ENTROPIES, fuse
from illada.training.parallel import Objective, Processes, distribute
from illada.training.recipe import LORA_TARGETS, ModelRecipe, Recipe
from illada.weights.adapters import (
    CONFIG,
    adapter_tensors,
    add_adapter,
    base_fingerprint,
    is_adapted,
    save_adapter_config,
)
from illada.weights.load import load_config, load_model
from illada.weights.runs import model_folder

DROPOUTS = ("attention_dropout", "resid_pdrop", "residual_dropout", "embedding_dropout")
"""What iLLaDA's and LLaDA's config.json call their dropouts."""


@dataclass(frozen=True)
class Run:
    """An opened run, seen from one of its processes."""

    recipe: Recipe
    folder: Path
    processes: Processes
    shards: Shards
    held_out: Shards | None
    """Validation data."""
    tokenizer: Any
    batches: Batches
    model: IlladaForMaskedLM
    objective: Objective
    """The loss of the model; what the trainer calls."""
    optimizers: list[torch.optim.Optimizer]
    parameters: list[torch.nn.Parameter]
    """The trained ones; shards of them when there are several processes."""
    tensors: dict[str, Tensor]
    """What checkpoints hold: trained weights, and moments as "weight/moment"."""
    frozen_weights: str | None
    """Fingerprint of the weights beside an adapter; None when all weights are trained."""
    hook: CheckpointHook
    remarks: list[str]
    """What a user should know before the run begins."""

    def write_about(self, folder: Path) -> None:
        """Write what a model folder holds besides weights."""
        folder.mkdir()
        if is_adapted(self.model):
            save_adapter_config(self.model, folder)
        else:
            config = copy.deepcopy(self.model.config)
            config.architectures, config.dtype = ["IlladaForMaskedLM"], torch.float32
            config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def open_run(recipe: Recipe, processes: Processes) -> Run:
    """Open what a recipe names; the run folder is not touched yet.

    Raises:
        IlladaError: when data, checkpoint or recipe are missing or do not fit each other.
    """
    folder, start = Path(recipe.output), recipe.model.start
    with processes.raise_together():
        shards = Shards.open(recipe.data.train)
        held_out = None if recipe.data.validation is None else open_validation(recipe.data.validation, shards)
        tokenizer = load_tokenizer(shards.path / "tokenizer")
        hook = CheckpointHook(folder, recipe.log.evaluate)
    # By one process: it may be a hub name, or a run whose newest checkpoint changes.
    start_folder = None if start is None else processes.from_first(lambda: model_folder(start))
    with processes.raise_together():
        config = shape_of(recipe.model, start_folder, shards, tokenizer)
        batches = make_batches(recipe, shards, config, tokenizer)
        model = build_model(recipe, start_folder, config)
        adapted = is_adapted(model)
        frozen_weights = base_fingerprint(model) if adapted else None
        remarks = remarks_on(recipe, start_folder, model) + fuse(model, recipe, processes.device)
        objective = distribute(model, recipe, processes, CROSS_ENTROPIES[recipe.training.cross_entropy])
    optimizers = make_optimizers(model, recipe.training)
    # Collected now, while the weights are in their shards: after a pass they may be gathered.
    named = dict(model.named_parameters())
    weights = adapter_tensors(model) if adapted else {name: p.detach() for name, p in named.items()}
    return Run(
        recipe=recipe,
        folder=folder,
        processes=processes,
        shards=shards,
        held_out=held_out,
        tokenizer=tokenizer,
        batches=batches,
        model=model,
        objective=objective,
        optimizers=optimizers,
        parameters=[p for p in named.values() if p.requires_grad],
        tensors=weights | moments(optimizers, {p: name for name, p in named.items()}),
        frozen_weights=frozen_weights,
        hook=hook,
        remarks=remarks,
    )


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
        if tokenizer_sha256(load_tokenizer(start)) != shards.tokenizer_sha256:
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


def make_batches(recipe: Recipe, shards: Shards, config: IlladaConfig, tokenizer: Any) -> Batches:
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
        eos_token_id=config.eos_token_id if isinstance(config.eos_token_id, int) else tokenizer.eos_token_id,
    )


def build_model(recipe: Recipe, start: Path | None, config: IlladaConfig) -> IlladaForMaskedLM:
    """Build the network with initial weights of the seed, or load the checkpoint to start from, in fp32 on the CPU.

    Weights that stay frozen beside an adapter keep their own type, unless the recipe computes in fp32.
    """
    lora = recipe.lora
    if start is not None:
        keep_type = bool(lora.rank) and recipe.training.dtype == "bf16"
        model, _ = load_model(str(start), "auto" if keep_type else "fp32", "cpu")
    else:
        # fork_rng: the seed must not leak into the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.training.seed)
            model = IlladaForMaskedLM(config)
    if lora.rank:
        assert start is not None
        assert recipe.model.start is not None
        base = os.path.abspath(start) if Path(recipe.model.start).exists() else recipe.model.start
        alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
        targets = lora.targets or LORA_TARGETS
        add_adapter(model, lora.rank, alpha, lora.dropout, targets, base, recipe.training.seed)
    return model


def remarks_on(recipe: Recipe, start: Path | None, model: IlladaForMaskedLM) -> list[str]:
    """Return what a user should know before the run begins."""
    lines = []
    if start is not None:
        written = json.loads((start / "config.json").read_text())
        unused = [f"{name} {written[name]}" for name in DROPOUTS if written.get(name)]
        if unused:
            lines.append(f"{start} asks for {', '.join(unused)}: trained without, as this network has no dropout")
    if is_adapted(model):
        adapter, frozen = (
            sum(p.numel() for p in model.parameters() if p.requires_grad is trained) for trained in (True, False)
        )
        lines.append(f"an adapter of {adapter:,} parameters beside {frozen:,} frozen ones")
        if (rate := recipe.training.learning_rate) <= 2e-5:  # ours: between what is usual for weights and for adapters
            lines.append(f"training.learning_rate {rate:g} suits all weights: adapters want ten times as much or more")
    return lines
