"""One loop for pre-training and SFT (paper §2.2–2.3): the recipe says what differs.

A run is a pure function of its recipe: killed at any moment and started again, it ends in the same weights, bit for
bit.
"""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from illada.adapters import CONFIG, add_adapter, base_fingerprint, is_adapted, save_adapter
from illada.data.batches import Batches
from illada.data.shards import Shards
from illada.data.tokenizer import load_tokenizer, tokenizer_sha256
from illada.diffusion.bound import bits_per_byte, validation_bound
from illada.diffusion.loss import masked_loss
from illada.diffusion.noisy import noisy_batches
from illada.errors import IlladaError
from illada.keyed import DROPOUT, bits
from illada.loading import choose_device, load_config, load_model, model_folder
from illada.model import IlladaConfig, IlladaForMaskedLM
from illada.training.checkpoint import RunState, checkpoints, load_checkpoint, save_checkpoint
from illada.training.recipe import LORA_TARGETS, ModelRecipe, Recipe
from illada.training.report import Report
from illada.training.schedule import Schedule, on_plateau

DECAY_FILE = "DECAY"
FREE_TO_CHANGE = (
    "training.validate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.device",
)
"""Recipe keys that may differ when a run is continued: they do not change the weights it ends in."""

DROPOUTS = ("attention_dropout", "resid_pdrop", "residual_dropout", "embedding_dropout")
"""What iLLaDA's and LLaDA's config.json call their dropouts."""


class DivergedError(RuntimeError):
    """Loss or gradient stopped being finite; the message names the last good checkpoint."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    model: Path
    """The finished model's or adapter's folder, or the checkpoint to continue from."""
    interrupted: int | None
    """The signal that stopped the run; None when it is complete."""


def train(recipe: Recipe, title: str = "train") -> Result:
    """Carry out a recipe, from its newest checkpoint if there is one.

    Raises:
        IlladaError: bad recipe, missing or unfitting data, or a run folder that belongs to another recipe.
        DivergedError: the loss is not finite.
    """
    recipe.check()
    settings = recipe.training
    shards = Shards.open(recipe.data.train)
    validation = None if recipe.data.validation is None else _validation(recipe.data.validation, shards)
    tokenizer = load_tokenizer(shards.path / "tokenizer")
    # Once: it may be a hub name, or a run whose newest checkpoint changes.
    start = None if recipe.model.start is None else model_folder(recipe.model.start)
    config = _config(recipe.model, start, shards, tokenizer)
    if recipe.data.window > config.max_position_embeddings:
        raise IlladaError(
            f"data.window {recipe.data.window} is longer than the model's context {config.max_position_embeddings}: "
            "lower it or raise model.max_position_embeddings"
        )
    eos = config.eos_token_id if isinstance(config.eos_token_id, int) else tokenizer.eos_token_id
    batches = Batches(
        shards,
        window=recipe.data.window,
        samples_per_step=settings.samples_per_step,
        seed=settings.seed,
        split_probability=recipe.data.split_probability,
        boundaries=recipe.data.boundaries,
        rule=settings.rule,
        eos_token_id=eos,
    )
    run = Path(recipe.output)
    device = choose_device(settings.device)
    model = _model(recipe, start, config).to(device)
    # Last, so that a recipe that cannot work leaves nothing behind.
    _claim(run, recipe, shards, base_fingerprint(model) if is_adapted(model) else None)
    optimizer = _optimizer(model, recipe)
    state = RunState()
    saved = checkpoints(run)
    if saved:
        state = load_checkpoint(saved[-1], model, optimizer)
    schedule = _schedule(recipe, batches, state)

    def save() -> Path:
        return save_checkpoint(run, model, optimizer, state, tokenizer, settings.keep_checkpoints)

    def precision() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if settings.dtype == "bf16" else nullcontext()

    def dropout(step: int, part: int) -> Any:
        return _seeded(device, settings.seed, DROPOUT, step, part) if recipe.lora.dropout else nullcontext()

    with _signals() as caught, Report(run, title, schedule.steps, state.step) as report:
        for line in _remarks(recipe, start, model):
            report.say(f"{title}: {line}")
        if state.step:
            report.say(f"{title}: continuing {run} at step {state.step} of {schedule.steps}")
        model.train()
        started, started_tokens = time.monotonic(), state.tokens
        while state.step < schedule.steps and not caught:
            if (decay := _decay_asked(run, state, schedule)) is not None:
                state.decay_start = decay
                schedule = _schedule(recipe, batches, state)
                report.say(f"{title}: decaying from step {decay}, the run ends at step {schedule.steps}")
            rate = schedule.learning_rate(state.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            plan = batches.plan(state.step)
            loss = torch.zeros((), device=device)
            noisy = noisy_batches(
                plan, settings.samples_per_batch, shards, settings.seed, state.step, settings.rule, eos
            )
            for number, batch in enumerate(noisy):
                with precision(), dropout(state.step, number):
                    part = masked_loss(model, *batch.on(device), batch.packing)
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip or math.inf)
            if not math.isfinite(value := float(loss)) or not math.isfinite(float(norm)):
                last = checkpoints(run)
                raise DivergedError(
                    f"loss {value} and gradient norm {float(norm)} at step {state.step}: nothing was saved since "
                    + (f"the last good checkpoint {last[-1]}" if last else "the start, there is no good checkpoint")
                    + "; begin again with a lower training.learning_rate and another --output"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.tokens += sum(segment.size for sample in plan for segment in sample)
            speed = (state.tokens - started_tokens) / (time.monotonic() - started)
            record: dict[str, Any] = {
                "tokens": state.tokens,
                "loss": value,
                "learning_rate": rate,
                "gradient_norm": float(norm),
                "tokens_per_second": round(speed),
            }
            last_step = state.step == schedule.steps
            if validation is not None and (state.step % settings.validate_every == 0 or last_step):
                model.eval()
                with precision():
                    bound = validation_bound(
                        model,
                        validation,
                        recipe.data.window,
                        settings.validation_samples,
                        settings.samples_per_batch,
                    )
                model.train()
                state.validation_losses.append(bound)
                record["validation_loss"] = bound
                record["validation_bits_per_byte"] = bits_per_byte(bound, validation.tokens, validation.bytes)
                report.say(
                    f"{title}: step {state.step}  validation {bound:.4f} nats/token  "
                    f"{record['validation_bits_per_byte']:.4f} bits/byte"
                )
                waiting = settings.decay_when == "plateau" and state.step < schedule.decay_start
                if waiting and on_plateau(state.validation_losses, settings.plateau_patience, settings.plateau_delta):
                    _write(run / DECAY_FILE, f"{state.step}\n")
            report.log(state.step, **record)
            report.progress(
                state.step, schedule.steps, f"loss {value:.3f}  lr {rate:.1e}  {speed / 1000:.1f}k tokens/s"
            )
            if state.step % settings.checkpoint_every == 0 or last_step:
                save()
        if caught:
            path = save()
            report.say(f"{title}: stopped by {signal.Signals(caught[0]).name}; the same command continues from {path}")
            return Result(path, caught[0])
    return Result(_finish(run, model, tokenizer), None)


def _validation(path: str, train_shards: Shards) -> Shards:
    shards = Shards.open(path)
    if not shards.tokens:
        raise IlladaError(f"{path} holds no tokens: prepare some text to validate on")
    if shards.tokenizer_sha256 != train_shards.tokenizer_sha256:
        raise IlladaError(
            f"{path} was prepared with another tokenizer than {train_shards.path}: prepare both with the same one"
        )
    return shards


def _config(recipe: ModelRecipe, start: Path | None, shards: Shards, tokenizer: Any) -> IlladaConfig:
    """Return the network's shape: the checkpoint's, or the preset's with the tokenizer's vocabulary and ids."""
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
    return IlladaConfig.preset(recipe.preset, **{**recipe.sizes(), "vocab_size": shards.vocab_size, **ids})


def _model(recipe: Recipe, start: Path | None, config: IlladaConfig) -> IlladaForMaskedLM:
    """Build the network with keyed initial weights, or load the one to start from, in fp32.

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
    if recipe.model.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def _optimizer(model: IlladaForMaskedLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, not on norm gains."""
    training = recipe.training
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    gains = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(training.beta1, training.beta2), fused=True)


def _schedule(recipe: Recipe, batches: Batches, state: RunState) -> Schedule:
    training = recipe.training
    steps = training.steps
    if steps is None:
        assert training.epochs is not None
        steps = max(1, round(training.epochs * batches.samples / training.samples_per_step))
    decay_steps = steps // 10 if training.decay_steps is None else min(training.decay_steps, steps)
    start = steps - decay_steps if state.decay_start is None else min(state.decay_start, steps - decay_steps)
    rates = (training.learning_rate, training.final_learning_rate)
    return Schedule(*rates, training.warmup_steps, training.decay, decay_steps, start)


def _decay_asked(run: Path, state: RunState, schedule: Schedule) -> int | None:
    """Return the step at which to begin the decay now, if the run folder asks for it.

    The step is written into the file, so that a run killed after the switch switches at the same step again.
    """
    path = run / DECAY_FILE
    if state.decay_start is not None or state.step >= schedule.decay_start or not path.exists():
        return None
    text = path.read_text().strip()
    if not text.isdecimal():  # whatever a person put there, mostly nothing
        _write(path, f"{state.step}\n")
        return state.step
    return int(text) if int(text) <= state.step else None


def _claim(run: Path, recipe: Recipe, shards: Shards, base: str | None) -> None:
    """Write the recipe into a new run folder, or check that the folder is a run of this recipe.

    `base` is the fingerprint of the frozen weights, which no checkpoint holds; None when all weights are trained.
    """
    sources = shards.index["provenance"].get("source_fingerprint")
    data = {"tokens": shards.tokens, "tokenizer": shards.tokenizer_sha256, "sources": sources}
    written = {**asdict(recipe), "data_fingerprint": data}
    del written["output"]
    if base is None:
        del written["lora"]
    else:
        written["base_fingerprint"] = base
    path = run / "recipe.yaml"
    if path.exists():
        before = yaml.safe_load(path.read_text())
        free = set(FREE_TO_CHANGE)
        if recipe.training.decay_when == "plateau":  # then validations decide when the decay begins
            free.discard("training.validate_every")
        changed = [k for k in _differences(before, written) if k not in free]
        if changed:
            raise IlladaError(
                f"{run} holds a run with another recipe ({', '.join(changed[:4])} differ): "
                "choose another --output or restore the recipe"
            )
        return
    if run.exists() and (not run.is_dir() or any(p.suffix != ".partial" for p in run.iterdir())):
        raise IlladaError(f"{run} is not empty and holds no run: choose another --output")
    run.mkdir(parents=True, exist_ok=True)
    _write(path, yaml.safe_dump(written, sort_keys=False))


def _write(path: Path, text: str) -> None:
    """Write a small file so that it is whole or absent, whatever happens meanwhile."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else str(k))]
    return [] if a == b else [prefix]


def _finish(run: Path, model: IlladaForMaskedLM, tokenizer: Any) -> Path:
    """Write the finished model or adapter next to the checkpoints, complete or not at all; returns its folder."""
    target = run / ("adapter" if is_adapted(model) else "model")
    partial = run / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if is_adapted(model):
        save_adapter(model, partial)
    else:
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if not target.exists():
        partial.rename(target)
        return target
    for path in partial.iterdir():
        path.replace(target / path.name)
    partial.rmdir()
    return target


def _remarks(recipe: Recipe, start: Path | None, model: IlladaForMaskedLM) -> list[str]:
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


@contextmanager
def _seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Let the device's generator give the numbers of a key, and afterwards go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(int(bits(*key)))
        yield


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying in the middle of a step; a second SIGINT kills as usual."""
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, where no handler can be set
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
