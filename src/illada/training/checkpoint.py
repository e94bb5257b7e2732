"""Checkpoints: trained tensors, the optimiser's moments and the state of the run, in safetensors and JSON, no pickle.

    checkpoints/step-00000100/
      shard-*.safetensors   one from each process; another number of processes can read them as well
      about/                configuration and tokenizer
      state.json            the step and what else a run is
      XXH128SUMS            checksums of all files, written last
      model/ or adapter/    made when somebody asks for it (`export`)

All processes write their shards while the training goes on (torch.distributed.checkpoint). The folder is filled under a
temporary name and renamed when every process has written, so a visible checkpoint is complete.
"""

import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from illada.errors import DamagedError, IlladaError, first_line
from illada.files import write_json
from illada.folders import seal, sync
from illada.training.parallel import Processes
from illada.training.recipe import TrainingRecipe
from illada.weights.runs import ABOUT, STATE, RunState, check_checkpoint, checkpoints, read_state, set_aside
from illada.weights.tensor_file import CheckpointWriter

# A run of one process is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """The checkpoints of a run, seen from one of its processes; use as a context manager.

    Args:
        run: folder of the run.
        processes: those of the run; all of them make the same calls.
        tensors: what to save, by name: weights, and moments as "weight/moment". Only their values may change.
        write_about: makes a folder of configuration and tokenizer.
        settings: keep_checkpoints and keep_every say which checkpoints to keep.
        on_saved: called with each new checkpoint; returns a checkpoint that must not be deleted yet, if there is one.
    """

    def __init__(
        self,
        run: Path,
        processes: Processes,
        tensors: Mapping[str, Tensor],
        write_about: Callable[[Path], None],
        settings: TrainingRecipe,
        on_saved: Callable[[Path], Path | None] = lambda _: None,
    ):
        self.run, self.processes, self.write_about, self.on_saved = run, processes, write_about, on_saved
        self.tensors = dict(tensors)
        self.keep, self.keep_every = settings.keep_checkpoints, settings.keep_every
        gpu = processes.device.type == "cuda"
        # A thread copies the tensors; the training waits for it only before it changes the weights (`wait_for_copy`).
        self._stager = DefaultStager(StagingOptions(gpu, False, True, gpu))
        self._copied: Any = None
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> "Checkpoints":
        """Delete what a killed run left half-written."""
        if self.processes.first:
            for path in (self.run / "checkpoints").glob(".*.partial"):
                shutil.rmtree(path)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the threads; a checkpoint being written is finished, its errors are dropped."""
        self._thread.shutdown()
        self._stager.close()

    def save(self, state: RunState) -> Path:
        """Begin to write checkpoints/step-NNNNNNNN and return its path; the previous checkpoint is finished first.

        Raises:
            IlladaError: when the previous checkpoint could not be written.
        """
        self.wait()
        target = self.run / "checkpoints" / f"step-{state.step:08d}"
        partial = target.with_name(f".{target.name}.partial")
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()  # the copy runs in another stream than the last update
        writer = CheckpointWriter(str(partial), save_distributed=True)
        response = async_save(
            self.tensors,
            storage_writer=writer,
            process_group=self.processes.files,
            async_stager=self._stager,
            no_dist=self.processes.count == 1,
        )
        assert isinstance(response, AsyncSaveResponse)  # because the stager is asynchronous
        self._copied = response.staging_completion
        uploaded = response.upload_completion
        self._writing = self._thread.submit(self._publish, uploaded, writer, partial, target, asdict(state))
        return target

    def wait_for_copy(self) -> None:
        """Return when the weights may change, because the checkpoint being written has its copy of them."""
        if self._copied is not None:
            self._copied.result()
            self._copied = None

    def wait(self) -> None:
        """Return when the checkpoint being written is complete.

        Raises:
            IlladaError: when it could not be written.
        """
        writing, self._writing, self._copied = self._writing, None, None
        if writing is None:
            return
        with self.processes.raise_together():
            try:
                writing.result()
            except (Exception, CheckpointException) as error:
                raise IlladaError(f"no checkpoint could be written in {self.run}: {_cause(error)}") from error

    def load_newest(self, steps: int) -> RunState | None:
        """Load the newest whole checkpoint in place, bit for bit, and return the state; None when there is none at all.

        Any number of processes may have written it. Damaged newer ones get another name (`set_aside`), and a line on
        stderr says so. The run has at most `steps` steps.

        Raises:
            IlladaError: when no checkpoint is whole, or the newest whole one does not fit the model.
        """
        self.wait()
        found = self.processes.from_first(lambda: checkpoints(self.run))
        damaged: list[Path] = []
        for path in reversed(found):
            state, fault = self._load(path, steps)
            if fault is None:
                self.processes.from_first(lambda: set_aside(damaged))
                return state
            damaged.append(path)
            if self.processes.first:
                print(f"checkpoint {path.name} is put aside: {fault}", file=sys.stderr, flush=True)
        if not found:
            return None
        with self.processes.raise_together():
            raise IlladaError(f"no checkpoint in {self.run} is whole: restore a copy, or begin in another --output")

    def _load(self, path: Path, steps: int) -> tuple[RunState | None, str | None]:
        """Load a checkpoint if it is whole; return the state and, instead, what is damaged, in every process the same.

        Raises:
            IlladaError: when the checkpoint does not fit the model.
        """
        state, fault, mismatches = None, None, list[str]()
        try:
            check_checkpoint(path, (self.processes.rank, self.processes.count))
            state = read_state(path, steps)
            saved = set(HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)
            mismatches = sorted(saved - self.tensors.keys())
            if lacking := sorted(self.tensors.keys() - saved):
                raise DamagedError(f"none of its shards holds {lacking[0]}")
        except Exception as error:
            fault = first_line(error)
        if (fault := self.processes.first_of(fault)) is not None:
            return None, fault
        with self.processes.raise_together():
            if mismatches:
                raise IlladaError(f"checkpoint {path} has another shape than the recipe: {mismatches[0]} has no place")
        try:
            load(
                self.tensors,
                storage_reader=HuggingFaceStorageReader(str(path)),
                process_group=self.processes.files,
                no_dist=self.processes.count == 1,
            )
        except (Exception, CheckpointException) as error:
            fault = _cause(error)
        return state, self.processes.first_of(fault)

    def _publish(
        self, uploaded: Any, writer: CheckpointWriter, partial: Path, target: Path, state: dict[str, Any]
    ) -> None:
        """Rename a checkpoint once all processes have written, then delete the checkpoints not to be kept."""
        uploaded.result()
        if not self.processes.first:
            return
        self.write_about(partial / ABOUT)
        write_json(partial / STATE, state)
        seal(partial, writer.sums)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        sync(target.parent)
        in_use = self.on_saved(target)
        for old in checkpoints(self.run)[: -self.keep]:
            step = int(old.name.removeprefix("step-"))
            if old != in_use and (self.keep_every is None or step % self.keep_every):
                shutil.rmtree(old)


def _cause(error: Exception | CheckpointException) -> str:
    """Return the first line of an error; CheckpointException, which is no `Exception`, holds an error per process."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return first_line(cause)
