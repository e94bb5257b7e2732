"""A run opened: the data, tokenizer, network and optimisers that a recipe names, read and checked once."""

import copy
import os
from pathlib import Path
from typing import Any

import torch

from illada.data.batches import Batches
from illada.data.optional.checks import check_data
from illada.data.shards import Shards
from illada.devices import choose_device
from illada.diffusion.noise import EPSILON, Noise
from illada.errors import IlladaError
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.text.tokenizer import load_tokenizer, tokenizer_sha256
from illada.training.optim import make_optimizers, moments
from illada.training.optional.average import Average
from illada.training.optional.checkpoint_hook import CheckpointHook
from illada.training.optional.dropout import Dropout
from illada.training.optional.flops import check_shape
from illada.training.optional.kernels import CROSS_ENTROPIES, fuse
from illada.training.optional.remarks import remarks_on
from illada.training.parallel import Objective, Processes, distribute
from illada.training.recipe import LORA_TARGETS, ModelRecipe, Recipe
from illada.weights import adapters
from illada.weights.adapters import base_fingerprint, is_adapted
from illada.weights.load import load_config, load_model
from illada.weights.runs import model_folder


class Run:
    """What a recipe names, opened once in each process; the run folder is not touched.

    Attributes:
        held_out: validation data; None without validation.
        objective: the loss of the network.
        parameters: the trained ones; shards of them when there are several processes.
        tensors: what checkpoints hold: trained weights, moments as "weight/moment", and the average.
        frozen_weights: fingerprint of the weights beside an adapter; None when all weights are trained.
        remarks: what a user should know before the run begins.

    Raises:
        IlladaError: when data, checkpoint or recipe are missing or do not fit each other.
    """

    loss: type[Objective] = Objective

    def __init__(self, recipe: Recipe, processes: Processes):
        self.recipe, self.processes, self.folder = recipe, processes, Path(recipe.output)
        with processes.raise_together():
            unread = self.open_data()
            self.hook = CheckpointHook(self.folder, recipe.log.evaluate)
        # Once, by one process: it may be a hub name, or a run whose newest checkpoint changes.
        name = recipe.model.start
        start = None if name is None else processes.from_first(lambda: model_folder(name))
        with processes.raise_together():
            config = shape_of(recipe.model, start, self.shards, self.tokenizer)
            self.batches = self.make_batches(config)
            self.model = build_model(recipe, start, config)
            adapted = is_adapted(self.model)
            self.frozen_weights = base_fingerprint(self.model) if adapted else None
            self.remarks = unread + remarks_on(recipe, start, self.model, self.batches, processes.device)
            self.remarks += fuse(self.model, recipe, processes.device)
            cross_entropy = CROSS_ENTROPIES[recipe.training.cross_entropy]
            self.objective = distribute(self.model, recipe, processes, cross_entropy, self.loss)
        self.dropout = Dropout(self.model, recipe.training.dropout, recipe.training.seed)
        self.optimizers = make_optimizers(self.model, recipe.training)
        # Collected now, while the weights are in their shards: after a pass they may be gathered.
        named = dict(self.model.named_parameters())
        self.parameters = [p for p in named.values() if p.requires_grad]
        weights = adapters.adapter_tensors(self.model) if adapted else {name: p.detach() for name, p in named.items()}
        self.average = Average(weights, recipe.training.average)
        self.tensors = weights | moments(self.optimizers, {p: name for name, p in named.items()}) | self.average.tensors

    def open_data(self) -> list[str]:
        """Open training data, held-out data and tokenizer; return what a user should know of them."""
        data, processes = self.recipe.data, self.processes
        self.shards = Shards.open(data.train)
        self.held_out = None if data.validation is None else open_validation(data.validation, self.shards)
        self.tokenizer = load_tokenizer(self.shards.path / "tokenizer")
        return check_data((data.train, data.validation), (processes.rank, processes.count))

    def make_batches(self, config: IlladaConfig) -> Batches:
        """Return the training set as a function of the step.

        Raises:
            IlladaError: when a window is longer than the context, data fills none, or a causal model has noise.
        """
        data, training, eos = self.recipe.data, self.recipe.training, config.eos_token_id
        training.check_masks(config.causal)
        if data.window > config.max_position_embeddings:
            raise IlladaError(
                f"data.window {data.window} is longer than the model's context {config.max_position_embeddings}: "
                "lower it or raise model.max_position_embeddings"
            )
        eos = eos if isinstance(eos, int) else self.tokenizer.eos_token_id
        numbers = (data.window, training.samples_per_step, training.seed, data.split_probability)
        # A complement's p is 1 - p, which must not be less than eps either.
        low, high = training.mask_range or (EPSILON, 1 - EPSILON if training.complementary else 1.0)
        noise = Noise(training.noise == "bell", (low, high), training.loss_weight, training.complementary)
        return Batches(self.shards, *numbers, data.boundaries, training.rule, eos, data.shift_windows, noise)

    def write_about(self, folder: Path) -> None:
        """Write what a model folder holds besides weights."""
        folder.mkdir()
        if is_adapted(self.model):
            adapters.save_adapter_config(self.model, folder)
        else:
            config = copy.deepcopy(self.model.config)
            config.architectures, config.dtype = ["IlladaForMaskedLM"], torch.float32
            config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def open_validation(path: str, train_shards: Shards) -> Shards:
    """Open held-out data that must come from the tokenizer of the training data.

    Raises:
        IlladaError: when it does not, holds nothing, or holds preference pairs for a run that learns from none.
    """
    shards = Shards.open(path)
    if shards.kind == "preference" != train_shards.kind:
        raise IlladaError(f"{path} holds preference pairs: they are data for `illada dpo`")
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
        if (start / adapters.CONFIG).is_file():
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


def build_model(recipe: Recipe, start: Path | None, config: IlladaConfig) -> IlladaForMaskedLM:
    """Build the network with initial weights of the seed, or load the checkpoint to start from, in fp32 on the CPU.

    Weights that stay frozen beside an adapter keep their own type, unless the recipe computes in fp32.
    """
    lora = recipe.lora
    if start is not None:
        keep_type = bool(lora.rank) and recipe.training.dtype == "bf16"
        model, _ = load_model(str(start), "auto" if keep_type else "fp32", "cpu")
    else:
        check_shape(config, choose_device(recipe.training.device))
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
        adapters.add_adapter(model, lora.rank, alpha, lora.dropout, targets, base, recipe.training.seed)
    return model
