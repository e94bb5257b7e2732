"""What a user should know before a run begins: a run that will learn next to nothing says so."""

import json
from pathlib import Path

import torch

from illada.data.batches import Batches
from illada.model.transformer import IlladaForMaskedLM
from illada.training.optional.flops import flops_per_token
from illada.training.recipe import Recipe
from illada.training.schedule import Schedule, make_schedule
from illada.weights.adapters import is_adapted

DROPOUTS = ("attention_dropout", "resid_pdrop", "residual_dropout", "embedding_dropout")
"""What iLLaDA's and LLaDA's config.json call their dropouts."""

WARMUP_SHARE = 1 / 4
"""A warm-up over more than this share of a run is worth a warning (ours; the recipes keep below a fifth)."""

CPU_FLOPS = 2e11
"""Operations a second of a CPU in training: a generous round figure, to find out steps of hours."""


def remarks_on(
    recipe: Recipe, start: Path | None, model: IlladaForMaskedLM, batches: Batches, device: torch.device
) -> list[str]:
    """Return what a user should know before the run begins; what makes it useless begins with "warning: "."""
    lines = []
    if start is not None:
        config = json.loads((start / "config.json").read_text())
        unused = [f"{name} {config[name]}" for name in DROPOUTS if config.get(name)]
        if unused:
            lines.append(f"{start} asks for {', '.join(unused)}: trained without, only training.dropout counts")
    if is_adapted(model):
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in model.parameters()) - adapter
        lines.append(f"an adapter of {adapter:,} parameters beside {frozen:,} frozen ones")
        if (rate := recipe.training.learning_rate) <= 2e-5:  # ours: between what is usual for weights and for adapters
            lines.append(f"training.learning_rate {rate:g} suits all weights: adapters want ten times as much or more")
    schedule = make_schedule(recipe.training, batches.samples, None)
    found = [_on_warmup(schedule), _on_data(batches), _on_time(model, batches, device)]
    return lines + [f"warning: {line}" for line in found if line]


def _on_warmup(schedule: Schedule) -> str | None:
    """Warn of a learning rate that is small for much or all of the run."""
    steps, warmup, start = schedule.steps, schedule.warmup_steps, schedule.decay_start
    early_decay = start < warmup and schedule.decay_steps > 0 and start < (1 - WARMUP_SHARE) * steps
    if warmup <= max(1, WARMUP_SHARE * steps) and not early_decay:
        return None
    highest = max(map(schedule.learning_rate, range(min(steps, warmup + 1))))
    line = f"the learning rate warms up for {warmup} of {steps} steps"
    if early_decay:
        line += f" and decays from step {start} on"
    if highest < 0.99 * schedule.peak:
        line += f", and gets no higher than {highest:.1e} of {schedule.peak:.1e}"
    remedy = f"--training.warmup_steps {steps // 10}" + f" --training.decay_steps {steps // 5}" * early_decay
    return (
        f"{line}: the model may learn next to nothing; add {remedy}, or take more steps (more epochs, or a lower "
        "--training.samples_per_step)"
    )


def _on_data(batches: Batches) -> str | None:
    """Warn of a step that holds more than all of the data, and of windows so long that much of it is left out."""
    if batches.samples < batches.samples_per_step:
        what = "conversations" if batches.rule == "llada" else f"windows of {batches.window:,} tokens"
        times = batches.samples_per_step / batches.samples
        fitting = max(1, batches.samples // 16)
        remedy = f"--training.samples_per_step {fitting}"
        if fitting < 8 and batches.rule != "llada":
            remedy += " and shorter windows, --data.window"
        return (
            f"a step takes {batches.samples_per_step:,} windows, the data holds {batches.samples:,} {what}: every step "
            f"sees all of it {times:.1f} times; add {remedy}"
        )
    if batches.rule == "llada" or batches.shift_windows:
        return None
    seen = sum(source.tokens // batches.window * batches.window for source in batches.shards.sources)
    if seen < 0.75 * batches.shards.tokens:
        return (
            f"windows of {batches.window:,} tokens leave out {1 - seen / batches.shards.tokens:.0%} of the data, which "
            "does not fill one more: add a smaller --data.window, or --data.shift_windows"
        )
    return None


def _on_time(model: IlladaForMaskedLM, batches: Batches, device: torch.device) -> str | None:
    """Warn of steps that take a CPU the better part of an hour or more."""
    if device.type != "cpu":
        return None
    tokens = batches.samples_per_step * batches.window
    hours = tokens * flops_per_token(model.config, batches.window) / CPU_FLOPS / 3600
    if hours < 0.5:
        return None
    return (
        f"a step is {tokens:,} tokens, on a CPU {hours:,.1f} hours or more: add a smaller --data.window and "
        "--training.samples_per_step, or begin with a recipe for a laptop, as tiny-cpu-pretrain"
    )
