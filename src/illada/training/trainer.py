"""One loop for pre-training and SFT (paper §2.2–2.3): the recipe says what differs.

A run is a pure function of its recipe: killed at any moment and started again, it ends in the same weights, bit for bit
on as many processes, to rounding on others.
"""

import copy
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from illada.data.collate import Batch, noisy_batches
from illada.data.prefetch import Prefetch
from illada.data.shards import Shards
from illada.devices import peak_memory
from illada.errors import DivergedError
from illada.files import write_text
from illada.model import IlladaForMaskedLM
from illada.rng import DROPOUT, bits
from illada.text.tokenizer import load_tokenizer
from illada.training.checkpoint import Checkpoints, RunState
from illada.training.checkpoint_hook import Evaluations
from illada.training.flops import flops_per_token, peak_flops
from illada.training.kernels import fuse
from illada.training.log import Report
from illada.training.optim import make_optimizers, moments, set_updates, update
from illada.training.parallel import Objective, Processes, before_pass, clip, distribute, gradient_norm, join, release
from illada.training.recipe import Recipe
from illada.training.run_folder import DECAY, claimed, decay_asked
from illada.training.schedule import on_plateau
from illada.training.setup import build_model, make_batches, open_validation, remarks, schedule_of, shape_of
from illada.training.spikes import RETURNS_TO_ONE_STEP, SKIPS_IN_A_ROW, data_step, remember, trouble
from illada.training.trackers import make_trackers
from illada.training.validation import bits_per_byte, validation_batches
from illada.weights.adapters import adapter_tensors, base_fingerprint, is_adapted, save_adapter_config
from illada.weights.runs import assemble, checkpoints, model_folder

BUCKETS = 5
"""Parts of the mask ratio by which the loss is reported."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    model: Path
    """The finished model's or adapter's folder, or the checkpoint to continue from."""
    interrupted: int | None
    """The signal that stopped the run; None when it is complete."""


def train(recipe: Recipe, title: str = "train") -> Result:
    """Carry out a recipe, from its newest checkpoint if there is one; in each of the processes that torchrun started.

    Raises:
        IlladaError: bad recipe, missing or unfitting data, or a run folder that belongs to another recipe or trainer.
        DivergedError: the loss is not finite.
    """
    recipe.check()
    with join(recipe.training.device, recipe.parallel.tensor) as processes:
        try:
            return _train(recipe, title, processes)
        except DivergedError:
            if processes.first:
                raise
            sys.exit(1)  # the first has said it


def _train(recipe: Recipe, title: str, processes: Processes) -> Result:
    settings, run = recipe.training, Path(recipe.output)
    with processes.raise_together():
        shards = Shards.open(recipe.data.train)
        held_out = None if recipe.data.validation is None else open_validation(recipe.data.validation, shards)
        tokenizer = load_tokenizer(shards.path / "tokenizer")
        evaluations = Evaluations(run, recipe.log.evaluate)
    # Once: it may be a hub name, or a run whose newest checkpoint changes.
    given = recipe.model.start
    start = None if given is None else processes.from_first(lambda: model_folder(given))
    with processes.raise_together():
        config = shape_of(recipe.model, start, shards, tokenizer)
        eos = config.eos_token_id if isinstance(config.eos_token_id, int) else tokenizer.eos_token_id
        batches = make_batches(recipe, shards, config, eos)
        model = build_model(recipe, start, config)
        base = base_fingerprint(model) if is_adapted(model) else None
        notes = remarks(recipe, start, model) + fuse(model, recipe, processes.device)
        objective = distribute(model, recipe, processes)
    optimizers = make_optimizers(model, settings)
    # Now, while the weights are in their shards: later they may just be gathered.
    named = dict(model.named_parameters())
    trained = [parameter for parameter in named.values() if parameter.requires_grad]
    adapter = sum(p.numel() for p in trained) if is_adapted(model) else 0
    kept = adapter_tensors(model) if is_adapted(model) else {name: p.detach() for name, p in named.items()}
    kept |= moments(optimizers, {parameter: name for name, parameter in named.items()})

    state = RunState()

    def make(step: int) -> Iterable[Batch]:
        """Return this process's share of a step."""
        plan = batches.plan(data_step(step, settings.seed, state.returns))
        sizes = (settings.samples_per_batch, shards, settings.seed, step, settings.rule, eos)
        rank, ranks = processes.share
        return noisy_batches(plan, *sizes, rank=rank, ranks=ranks, causal=config.causal)

    def go_back() -> RunState | None:
        """Load the newest checkpoint, if there is one."""
        saved.wait()
        if (path := saved.newest()) is None:
            return None
        loaded = saved.load(path)
        set_updates(optimizers, loaded.updates)
        return loaded

    with (
        # Last, so that a recipe that cannot work leaves nothing behind.
        _claimed(run, recipe, shards, base, processes),
        evaluations,
        Checkpoints(run, processes, kept, partial(_describe, model, tokenizer), settings, evaluations) as saved,
        _signals() as caught,
        Prefetch(make) as ahead,
    ):
        state = go_back() or state
        schedule = schedule_of(recipe, batches, state)
        with processes.raise_together():
            trackers = make_trackers(run, recipe.log, state.step + 1, asdict(recipe)) if processes.first else []
        with Report(run, title, schedule.steps, state.step, quiet=not processes.first, trackers=trackers) as report:
            for line in notes:
                report.say(f"{title}: {line}")
            if state.step:
                report.say(f"{title}: continuing {run} at step {state.step} of {schedule.steps}")
            model.train()
            peak = peak_flops(processes.device)
            started, started_tokens = time.monotonic(), state.tokens
            while state.step < schedule.steps:
                asked = decay_asked(run, state, schedule) if processes.first else None
                stop, decay = processes.highest(max(caught, default=0), -1 if asked is None else asked)
                if stop:
                    path = saved.save(state)
                    saved.wait()
                    name = signal.Signals(stop).name
                    report.say(f"{title}: stopped by {name}; the same command continues from {path}")
                    return Result(path, stop)
                if decay >= 0:
                    state.decay_start = decay
                    schedule = schedule_of(recipe, batches, state)
                    report.say(f"{title}: decaying from step {decay}, the run ends at step {schedule.steps}")
                plan = batches.plan(data_step(state.step, settings.seed, state.returns))
                loss, by_ratio = _gradients(objective, ahead(state.step), len(plan), state.step, recipe, processes)
                norm = gradient_norm(trained)
                rate = schedule.learning_rate(state.step)
                record: dict[str, Any] = {
                    "loss": loss,
                    "bits_per_byte": bits_per_byte(loss, shards.tokens, shards.bytes),
                    **({} if config.causal else {"loss_by_mask_ratio": by_ratio}),
                    "learning_rate": rate,
                    "gradient_norm": float(norm),
                }
                deviations = None if settings.on_spike == "none" else settings.spike_deviations
                if (wrong := trouble(state, loss, float(norm), deviations)) is not None:
                    record["trouble"] = wrong
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    here, state = state.step, _leave_out(saved, state, settings.on_spike, wrong, go_back)
                    if settings.on_spike == "rollback":
                        report.say(
                            f"{title}: {wrong} at step {here}: back to step {state.step} and other data than before"
                        )
                        report.rewind(state.step)
                        schedule = schedule_of(recipe, batches, state)
                        started, started_tokens = time.monotonic(), state.tokens
                        continue
                    report.say(f"{title}: {wrong} at step {here}: left out")
                else:
                    if settings.gradient_clip:
                        clip(trained, settings.gradient_clip, norm)
                    saved.wait_for_copy()
                    update(optimizers, rate)
                    remember(state, loss)
                    state.tokens += sum(segment.size for sample in plan for segment in sample)
                state.step += 1
                speed = (state.tokens - started_tokens) / (time.monotonic() - started)
                record |= {"tokens": state.tokens, "tokens_per_second": round(speed)}
                record |= {"memory_gb": round(peak_memory(processes.device) / 1e9, 3)}
                if peak is not None:
                    lengths = [segment.size for sample in plan for segment in sample]
                    seen = sum(length**2 for length in lengths) / sum(lengths)
                    record["mfu"] = round(flops_per_token(config, seen, adapter) * speed / (peak * processes.count), 4)
                last = state.step == schedule.steps
                if held_out is not None and (state.step % settings.validate_every == 0 or last):
                    bound = _validate(objective, held_out, recipe, processes)
                    bits_each = bits_per_byte(bound, held_out.tokens, held_out.bytes)
                    record |= {"validation_loss": bound, "validation_bits_per_byte": bits_each}
                    report.say(
                        f"{title}: step {state.step}  validation {bound:.4f} nats/token  {bits_each:.4f} bits/byte"
                    )
                    state.validation_losses.append(bound)
                    waiting = settings.decay_when == "plateau" and state.step < schedule.decay_start
                    flat = on_plateau(state.validation_losses, settings.plateau_patience, settings.plateau_delta)
                    if waiting and flat and processes.first:
                        write_text(run / DECAY, f"{state.step}\n")
                report.log(state.step, **record)
                for line in evaluations.news():
                    report.say(f"{title}: {line}")
                report.progress(
                    state.step, schedule.steps, f"loss {loss:.3f}  lr {rate:.1e}  {speed / 1000:.1f}k tokens/s"
                )
                if state.step % settings.checkpoint_every == 0 or last:
                    saved.save(state)
            saved.wait()
            if processes.first:
                for line in evaluations.finish(checkpoints(run)[-1]):
                    report.say(f"{title}: {line}")
        return Result(processes.from_first(lambda: assemble(checkpoints(run)[-1], run)), None)


def _gradients(
    objective: Objective,
    noisy: Iterable[Batch],
    samples: int,
    step: int,
    recipe: Recipe,
    processes: Processes,
) -> tuple[float, list[float | None]]:
    """Add up the gradients of this process's share, `noisy`, of a step of so many samples.

    Returns:
        the loss of the whole step in nats per token, and the mean cross-entropy of masked tokens in nats by their
        chance to be masked, in `BUCKETS` equal parts of 0 to 1 (None for a part without tokens, as without noise).
    """
    settings = recipe.training
    rank, ranks = processes.share
    share = -(-samples // ranks)
    passes = -(-share // settings.samples_per_batch)
    # The loss, then the sum and number of cross-entropies in each bucket of mask ratios.
    sums = torch.zeros(1 + 2 * BUCKETS, device=processes.device)
    for number, batch in enumerate(noisy):
        before_pass(objective, last=number == passes - 1)
        key = (settings.seed, DROPOUT, step, rank * passes + number)
        each_T = sums.new_zeros(batch.packing.tokens)
        clean_T, masked_T, weight_T = batch.on(processes.device)
        with _seeded(processes.device, *key) if recipe.lora.dropout else nullcontext():
            loss = objective(clean_T, masked_T, weight_T, batch.packing, each_T)
        loss.backward()
        sums[0] += loss.detach()
        if batch.probability_T is None:
            continue
        counted_T = masked_T & (weight_T > 0)
        bucket_T = 1 + (batch.probability_T.to(processes.device) * BUCKETS).long().clamp(max=BUCKETS - 1)
        sums.index_add_(0, bucket_T, each_T * counted_T)
        sums.index_add_(0, bucket_T + BUCKETS, counted_T.to(sums.dtype))
    total = processes.total(*sums.tolist())
    pairs = zip(total[1 : 1 + BUCKETS], total[1 + BUCKETS :], strict=True)
    return total[0], [entropy / count if count else None for entropy, count in pairs]


@torch.no_grad()
def _validate(objective: Objective, held_out: Shards, recipe: Recipe, processes: Processes) -> float:
    """Return the loss of held-out text (see `validation_batches`) in nats per token; each process has its share."""
    settings = recipe.training
    objective.eval()
    noisy = validation_batches(
        held_out,
        recipe.data.window,
        settings.validation_samples,
        settings.samples_per_batch,
        *processes.share,
        objective.model.config.causal,
    )
    bound = sum(float(objective(*batch.on(processes.device), batch.packing)) for batch in noisy)
    release(objective)
    objective.train()
    return processes.total(bound)[0]


def _leave_out(
    saved: Checkpoints, state: RunState, policy: str, wrong: str, go_back: Callable[[], RunState | None]
) -> RunState:
    """Return the state in which a run goes on after a step with trouble.

    Raises:
        DivergedError: when it should not, or has done so too often.
    """
    if policy == "skip" and state.skipped < SKIPS_IN_A_ROW:
        state.skipped += 1
        return state
    if policy == "rollback" and (back := go_back()) and state.returns.count(back.step) < RETURNS_TO_ONE_STEP:
        back.returns = [*state.returns, back.step]
        return back
    saved.wait()
    last = saved.newest()
    raise DivergedError(
        f"{wrong} at step {state.step}: nothing was saved since "
        + (f"the last good checkpoint {last}" if last else "the start, there is no good checkpoint")
        + "; begin again with a lower training.learning_rate and another --output"
    )


def _describe(model: IlladaForMaskedLM, tokenizer: Any, folder: Path) -> None:
    """Write what a model folder holds besides weights."""
    folder.mkdir()
    if is_adapted(model):
        save_adapter_config(model, folder)
    else:
        config = copy.deepcopy(model.config)
        config.architectures, config.dtype = ["IlladaForMaskedLM"], torch.float32
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _claimed(run: Path, recipe: Recipe, shards: Shards, base: str | None, processes: Processes) -> Iterator[None]:
    """Let the first process hold the run folder for all."""
    with ExitStack() as held:
        processes.from_first(lambda: held.enter_context(claimed(run, recipe, shards, base)))
        yield


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
