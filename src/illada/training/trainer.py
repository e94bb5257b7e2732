"""One loop for pre-training and SFT (paper §2.1, §2.2): the recipe says what differs.

A run is a pure function of its recipe: killed at any moment and started again, it ends in the same weights, bit for bit
on as many processes, to rounding on others.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from illada import rng
from illada.data.batches import Segment
from illada.data.collate import Batch, noisy_batches
from illada.data.prefetch import Prefetch
from illada.data.shards import Shards
from illada.devices import peak_memory
from illada.errors import DivergedError
from illada.files import write_text
from illada.training.checkpoint import Checkpoints
from illada.training.log import StepLog
from illada.training.optim import set_updates, update
from illada.training.optional.flops import flops_per_token, peak_flops
from illada.training.optional.pace import Pace
from illada.training.optional.spikes import RETURNS_TO_ONE_STEP, SKIPS_IN_A_ROW, data_step, remember, trouble
from illada.training.optional.trackers import make_trackers
from illada.training.parallel import before_pass, clip, gradient_norm, join, release
from illada.training.recipe import Recipe
from illada.training.run_folder import DECAY, claim, requested_decay
from illada.training.schedule import Schedule, make_schedule, on_plateau
from illada.training.setup import Run
from illada.training.validation import bits_per_byte, validation_batches
from illada.weights.adapters import is_adapted
from illada.weights.runs import RunState, assemble, checkpoints, read_metrics

BUCKETS = 5
"""Parts of the mask ratio by which the loss is reported."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    model: Path
    """The finished model's or adapter's folder, or the checkpoint to continue from."""
    interrupted: int | None
    """The signal that stopped the run; None when it is complete."""


def train(recipe: Recipe, title: str = "train", trainer: "type[Trainer] | None" = None) -> Result:
    """Carry out a recipe, from its newest checkpoint if there is one; in each of the processes that torchrun started.

    `trainer` takes the steps; None for those of pre-training and SFT.

    Raises:
        IlladaError: bad recipe, missing or unfitting data, or a run folder that belongs to another recipe or trainer.
        DivergedError: the loss is not finite.
    """
    recipe.check()
    with join(recipe.training.device, recipe.parallel.tensor) as processes:
        try:
            kind = trainer or Trainer
            return kind(kind.opens(recipe, processes), title).train()
        except DivergedError:
            if processes.first:
                raise
            sys.exit(1)  # the first process prints the error


class Trainer:
    """Carries out a run in one of its processes; all processes make the same calls.

    Args:
        run: the opened run.
        title: begins every line on the terminal.
    """

    opens: type[Run] = Run

    def __init__(self, run: Run, title: str):
        self.run, self.title, self.settings = run, title, run.recipe.training
        self.state = RunState()
        self.adapter = sum(p.numel() for p in run.parameters) if is_adapted(run.model) else 0
        self.peak_flops = peak_flops(run.processes.device)

    def train(self) -> Result:
        """Take the remaining steps of the run, until it is complete or a signal stops it."""
        run = self.run
        # The folder is claimed last, so that a recipe that cannot work leaves nothing behind.
        with run.processes.raise_together():
            claimed = claim(run.folder, run.recipe, run.shards, run.frozen_weights) if run.processes.first else None
        with (
            claimed or nullcontext(),
            run.hook,
            Checkpoints(
                run.folder, run.processes, run.tensors, run.write_about, self.settings, run.hook.begin
            ) as self.checkpoints,
            stop_signals() as self.signals,
            Prefetch(self.micro_batches) as self.prefetch,
        ):
            self.load_newest()
            with self.open_log() as self.log:
                run.model.train()
                self.start_clock()
                while self.state.step < self.schedule.steps:
                    stop_signal, decay_start = self.requests()
                    if stop_signal:
                        return self.stop(stop_signal)
                    if decay_start >= 0:
                        self.begin_decay(decay_start)
                    record = self.train_step()
                    if record is None:  # the run went back to a checkpoint
                        continue
                    if run.held_out is not None and self.due(self.settings.validate_every):
                        record |= self.validate(run.held_out)
                    self.write_log(record)
                    if self.due(self.settings.checkpoint_every):
                        self.checkpoints.save(self.state)
                self.checkpoints.wait()
                if run.processes.first:
                    self.log.say(*run.hook.finish(checkpoints(run.folder)[-1]))
            return Result(run.processes.from_first(lambda: assemble(checkpoints(run.folder)[-1], run.folder)), None)

    def due(self, every: int) -> bool:
        """Say whether something that happens every so many steps and after the last step happens now."""
        return self.state.step % every == 0 or self.state.step == self.schedule.steps

    @property
    def schedule(self) -> Schedule:
        """The learning rates, which depend on the step of an early decay."""
        return make_schedule(self.settings, self.run.batches.samples, self.state.decay_start)

    # A step

    def train_step(self) -> dict[str, Any] | None:
        """Take one optimiser step and return its record for the log; return None when the run went back instead."""
        run, state = self.run, self.state
        segments = [segment for sample in self.plan(state.step) for segment in sample]
        loss, figures = self.compute_gradients(self.prefetch(state.step))
        norm = gradient_norm(run.parameters)
        rate = self.schedule.learning_rate(state.step)
        record: dict[str, Any] = {
            "loss": loss,
            **figures,
            "learning_rate": rate,
            "gradient_norm": float(norm),
        }
        deviations = None if self.settings.on_spike == "none" else self.settings.spike_deviations
        if problem := trouble(state, loss, float(norm), deviations):
            record["trouble"] = problem
            if self.recover(problem):
                return None
        else:
            if self.settings.gradient_clip:
                clip(run.parameters, self.settings.gradient_clip, norm)
            self.checkpoints.wait_for_copy()
            update(run.optimizers, rate)
            remember(state, loss)
            run.average.update(state.updates)
            state.tokens += sum(segment.size for segment in segments)
        state.step += 1
        return record | self.measure_speed(segments)

    def plan(self, step: int) -> list[list[Segment]]:
        """Return the segments of every sample of a step."""
        return self.run.batches.plan(data_step(step, self.settings.seed, self.state.returns))

    def micro_batches(self, step: int) -> Iterator[Any]:
        """Make this process's share of a step."""
        run, batches = self.run, self.run.batches
        sizes = (self.settings.samples_per_batch, batches.shards, batches.seed, step, batches.rule)
        how = (batches.eos_token_id, *run.processes.share, run.model.config.causal, batches.noise)
        return noisy_batches(self.plan(step), *sizes, *how)

    def compute_gradients(self, batches: list[Any]) -> tuple[float, dict[str, Any]]:
        """Add up the gradients of this process's share of the step.

        Returns:
            the loss of the whole step in nats per token, and for the log bits per byte and the mean cross-entropy of
            masked tokens in nats by their chance to be masked, in `BUCKETS` equal parts of 0 to 1 (None for a part
            without tokens).
        """
        run, device = self.run, self.run.processes.device
        # The loss, then the sum and number of cross-entropies in each bucket of mask ratios.
        sums = torch.zeros(1 + 2 * BUCKETS, device=device)
        batch: Batch
        for number, batch in enumerate(batches):
            before_pass(run.objective, last=number == len(batches) - 1)
            run.dropout.begin(batch.places, device)
            key = (self.settings.seed, rng.DROPOUT, self.state.step, run.processes.share[0] * len(batches) + number)
            entropy_T = sums.new_zeros(batch.packing.tokens)
            clean_T, masked_T, weight_T = batch.on(device)
            with rng.seeded(device, *key) if run.recipe.lora.dropout else nullcontext():
                loss = run.objective(clean_T, masked_T, weight_T, batch.packing, entropy_T)
            loss.backward()
            sums[0] += loss.detach()
            if batch.probability_T is not None:
                counted_T = masked_T & (weight_T > 0)
                bucket_T = 1 + (batch.probability_T.to(device) * BUCKETS).long().clamp(max=BUCKETS - 1)
                sums.index_add_(0, bucket_T, entropy_T * counted_T)
                sums.index_add_(0, bucket_T + BUCKETS, counted_T.to(sums.dtype))
        loss_of_step, *buckets = run.processes.total(*sums.tolist())
        pairs = zip(buckets[:BUCKETS], buckets[BUCKETS:], strict=True)
        figures: dict[str, Any] = {"bits_per_byte": bits_per_byte(loss_of_step, run.shards.tokens, run.shards.bytes)}
        if not run.model.config.causal:
            figures["loss_by_mask_ratio"] = [entropy / count if count else None for entropy, count in pairs]
        return loss_of_step, figures

    def recover(self, problem: str) -> bool:
        """Leave out a step with trouble, or go back to the newest checkpoint; return whether the run went back.

        Raises:
            DivergedError: when the recipe allows neither, or the run has recovered too often.
        """
        policy, step, returns = self.settings.on_spike, self.state.step, self.state.returns
        for optimizer in self.run.optimizers:
            optimizer.zero_grad()
        if policy == "skip" and self.state.skipped < SKIPS_IN_A_ROW:
            self.state.skipped += 1
            self.log.say(f"{problem} at step {step}: left out")
            return False
        if policy == "rollback" and self.load_newest() and returns.count(self.state.step) < RETURNS_TO_ONE_STEP:
            self.state.returns = [*returns, self.state.step]
            self.log.say(f"{problem} at step {step}: back to step {self.state.step} and other data than before")
            self.log.rewind(self.state.step)
            self.start_clock()
            return True
        self.checkpoints.wait()
        last = next(reversed(checkpoints(self.run.folder)), None)
        raise DivergedError(
            f"{problem} at step {step}: nothing was saved since "
            + (f"the last good checkpoint {last}" if last else "the start, there is no good checkpoint")
            + "; begin again with a lower training.learning_rate and another --output"
        )

    # Around the steps

    def load_newest(self) -> bool:
        """Load the newest whole checkpoint; return whether there is one."""
        longest = make_schedule(self.settings, self.run.batches.samples, None).steps
        state = self.checkpoints.load_newest(longest)
        if state is not None:
            self.state = state
            set_updates(self.run.optimizers, state.updates)
        return state is not None

    def requests(self) -> list[int]:
        """Return the signal that stops the run (0 for none) and the step of a decay that begins now (-1 for none)."""
        first = self.run.processes.first
        decay_start = requested_decay(self.run.folder, self.state, self.schedule) if first else None
        return self.run.processes.highest(max(self.signals, default=0), -1 if decay_start is None else decay_start)

    def stop(self, number: int) -> Result:
        """Save the run because of a signal."""
        path = self.checkpoints.save(self.state)
        self.checkpoints.wait()
        self.log.say(f"stopped by {signal.Signals(number).name}; the same command continues from {path}")
        return Result(path, number)

    def begin_decay(self, step: int) -> None:
        """Let the learning rate fall from a step on."""
        self.state.decay_start = step
        self.log.say(f"decaying from step {step}, the run ends at step {self.schedule.steps}")

    def validate(self, held_out: Shards) -> dict[str, float]:
        """Return the loss of held-out text for the log; request the decay when the loss has stopped falling."""
        settings, state = self.settings, self.state
        loss, own = self.run.average.measure(lambda: self.validation_loss(held_out), self.checkpoints.wait_for_copy)
        state.validation_losses.append(loss)
        waiting = settings.decay_when == "plateau" and state.step < self.schedule.decay_start
        flat = on_plateau(state.validation_losses, settings.plateau_patience, settings.plateau_delta)
        if waiting and flat and self.run.processes.first:
            write_text(self.run.folder / DECAY, f"{state.step}\n")
        return {"validation_loss": loss} | self.describe_validation(loss, own, held_out)

    def describe_validation(self, loss: float, own: float, held_out: Shards) -> dict[str, float]:
        """Say what a validation showed, and return what of it the log keeps; `own` is without the average."""
        bits, raw = (bits_per_byte(x, held_out.tokens, held_out.bytes) for x in (loss, own))
        beside = f"  (without the average {raw:.4f})" if self.settings.average else ""
        self.log.say(f"step {self.state.step}  validation {loss:.4f} nats/token  {bits:.4f} bits/byte{beside}")
        record = {"validation_bits_per_byte": bits}
        return record | ({"raw_validation_bits_per_byte": raw} if self.settings.average else {})

    @torch.no_grad()
    def validation_loss(self, held_out: Shards) -> float:
        """Return the loss of held-out text in nats per token (see `validation_batches`); each process has its share."""
        run, settings = self.run, self.settings
        run.objective.eval()
        sizes = (run.recipe.data.window, settings.validation_samples, settings.samples_per_batch)
        batches = validation_batches(held_out, *sizes, *run.processes.share, run.model.config.causal)
        loss = sum(float(run.objective(*batch.on(run.processes.device), batch.packing)) for batch in batches)
        release(run.objective)
        run.objective.train()
        return run.processes.total(loss)[0]

    # What the run says

    def open_log(self) -> StepLog:
        """Return the log of the run, with the trackers that the recipe names, and say what a user should know."""
        run, state, first = self.run, self.state, self.run.processes.first
        with run.processes.raise_together():
            trackers = []
            if first:
                read_metrics(run.folder / "metrics.jsonl")  # damaged, it ends all processes and not this one alone
                trackers = make_trackers(run.folder, run.recipe.log, state.step + 1, asdict(run.recipe))
        log = StepLog(run.folder, self.title, self.schedule.steps, state.step, quiet=not first, trackers=trackers)
        log.say(*run.remarks)
        if state.step:
            log.say(f"continuing {run.folder} at step {state.step} of {self.schedule.steps}")
        return log

    def start_clock(self) -> None:
        """Measure the speed from now on."""
        self.pace = Pace(self.state.step, self.state.tokens)

    def measure_speed(self, segments: list[Segment]) -> dict[str, Any]:
        """Return tokens, speed, memory and, on a GPU whose peak is known, MFU, given the segments of the last step."""
        run, tokens = self.run, self.state.tokens
        speed = self.pace.take(tokens)
        memory = peak_memory(run.processes.device) / 1e9
        record = {"tokens": tokens, "tokens_per_second": round(speed), "memory_gb": round(memory, 3)}
        if self.peak_flops is not None:
            lengths = [segment.size for segment in segments]
            mean_length = sum(length**2 for length in lengths) / sum(lengths)  # of the segment of a token
            flops = flops_per_token(run.model.config, mean_length, self.adapter)
            record["mfu"] = round(flops * speed / (self.peak_flops * run.processes.count), 4)
        return record

    def write_log(self, record: dict[str, Any]) -> None:
        """Write the record of a step, and show it."""
        step, steps = self.state.step, self.schedule.steps
        self.log.write(step, **record)
        self.log.say(*self.run.hook.messages())
        self.log.progress(step, steps, self.pace.line(step, steps, record))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, so that they end the run between two steps; a second SIGINT kills as usual."""
    signals: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, where no handler can be set
        yield signals
        return
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
