"""Run the stages of a preparation on processes of this machine, on Ray or on Slurm, by datatrove's executors.

All of them skip finished tasks when a preparation is continued. Importing this module needs
`pip install 'illada[data]'`.
"""

import copy
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from illada.errors import IlladaError, first_line, needs
from illada.preparation.options import PrepareSettings
from illada.preparation.pipeline import Stage
from illada.reporting import PLAIN_EVERY, duration

with needs("data", "preparing data"):
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.utils.logging import logger

CLUSTER_SECONDS = 10.0
"""How long a Ray cluster may take to answer."""


def run_locally(stages: Sequence[Stage], log: Path, settings: PrepareSettings) -> None:
    """Run stages in processes of this machine.

    Raises:
        IlladaError: when a worker is killed, or what a task raises.
    """
    pool: ProcessPoolExecutor | None = None
    workers = min(settings.workers, max(stage.tasks for stage in stages))
    if workers > 1:
        context = get_context("forkserver")
        # The slow imports happen once, before the workers are forked.
        context.set_forkserver_preload(["illada.preparation.executors"])
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_silence)
    try:
        for stage in stages:
            executor = LocalPipelineExecutor(stage.steps, tasks=stage.tasks, logging_dir=str(log / stage.name))
            # Not executor.run(): it starts a manager process that outlives a killed run for ever, and waits for ever
            # when a worker is killed.
            ranks = executor.get_incomplete_ranks()
            if pool is None:
                for rank in ranks:
                    # A copy, because the steps count what they did.
                    copy.deepcopy(executor)._run_for_rank(rank)
                continue
            for future in as_completed([pool.submit(executor._run_for_rank, rank) for rank in ranks]):
                future.result()
    except BrokenProcessPool:
        raise IlladaError(
            "a worker was killed, perhaps for want of memory: prepare again with fewer workers to continue"
        ) from None
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def run_on_ray(stages: Sequence[Stage], log: Path, settings: PrepareSettings) -> None:
    """Run stages on the Ray cluster of RAY_ADDRESS or of this machine, or on Ray started here with a CPU per worker.

    Raises:
        IlladaError: when Ray is not installed, cannot be used or does not answer, or the first error of a task.
    """
    with needs("cluster", "executor ray"):
        import ray

    started = not ray.is_initialized()
    if started:
        _check_cluster()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if started:
        try:
            try:
                ray.init(address="auto", **options)
            except ConnectionError:
                ray.init(address="local", num_cpus=settings.workers, include_dashboard=False, **options)
        except Exception as error:  # Ray also raises bare exceptions
            raise IlladaError(
                f"Ray cannot be used here ({first_line(error)}): check RAY_ADDRESS, or use executor local"
            ) from error
    try:
        for stage in stages:
            executor = RayPipelineExecutor(
                stage.steps,
                tasks=stage.tasks,
                workers=settings.workers,
                logging_dir=str(log / stage.name),
                mem_per_cpu_gb=settings.memory_gb,
            )
            executor.run()
            # datatrove's run does not fail when a task does.
            if ranks := executor.get_incomplete_ranks():
                raise IlladaError(_failure(log / stage.name, ranks[0]))
    finally:
        if started:
            ray.shutdown()


def _check_cluster() -> None:
    """Check that the cluster which Ray would join answers; Ray itself waits for it without end.

    Raises:
        IlladaError: when it does not, with the remedy.
    """
    file = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    address, remedy = os.environ.get("RAY_ADDRESS", ""), "unset RAY_ADDRESS"
    if address in ("", "auto") and file.is_file():  # the cluster that was started last, or what it left behind
        address, remedy = file.read_text(errors="replace").strip(), f"delete {file}"
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CLUSTER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise IlladaError(
            f"the Ray cluster at {address} does not answer ({first_line(error)}): start it, or {remedy} to have one "
            "started here, or use executor local"
        ) from error


def submit_to_slurm(stages: Sequence[Stage], log: Path, settings: PrepareSettings) -> str:
    """Submit the stages as array jobs, each waiting for the previous one; return the number of the last job.

    Raises:
        IlladaError: when this is no Slurm cluster, or the jobs are refused.
    """
    if shutil.which("sbatch") is None:
        raise IlladaError("there is no sbatch here: run this on a login node of a Slurm cluster, or use executor local")
    pairs = (option.lstrip("-").partition("=") for option in settings.slurm_options)
    options = {name: value for name, _, value in pairs}
    executor: Any = None
    for stage in stages:
        executor = SlurmPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=settings.workers,
            partition=settings.partition,
            time=settings.time,
            mem_per_cpu_gb=settings.memory_gb,
            job_name=f"illada-{stage.name}",
            # The site's own default; "normal", datatrove's, does not exist everywhere.
            qos=options.get("qos", ""),
            sbatch_args=options,
            # The programs that the jobs call stand beside this Python.
            env_command=f"export PATH={os.path.dirname(sys.executable)}:$PATH",
            logging_dir=str(log / stage.name),
            depends=executor,
        )
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        raise IlladaError(
            f"sbatch refused the job (exit code {error.returncode}; its message is above): check partition, time "
            "and slurm_options"
        ) from None
    return str(executor.job_id)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence datatrove, which logs every task to the terminal; one progress line says enough."""
    _silence()
    try:
        yield
    finally:
        logger.enable("datatrove")


def _silence() -> None:
    logger.disable("datatrove")


def _failure(log: Path, rank: int) -> str:
    """Return what the log of a task says of its failure."""
    file = log / "logs" / f"task_{rank:05d}.log"
    text = file.read_text(errors="replace") if file.exists() else ""
    errors = re.findall(r"^(?:[\w.]*\.)?(\w*(?:Error|Exception)): (.*)", text, flags=re.MULTILINE)
    if not errors:
        return f"task {rank} did not finish, its log is {file}: prepare again to continue"
    kind, message = errors[-1]
    return message if kind == "IlladaError" else f"task {rank} failed ({kind}: {message}): see {file}"


def progress(work: Path, total_bytes: int) -> AbstractContextManager[Any]:
    """Show the bytes read by all tasks by a bar on a terminal, elsewhere by a line every `PLAIN_EVERY` seconds."""
    if not sys.stderr.isatty():
        return _plain_progress(work, total_bytes)
    bar = _ReadingProgress(work)
    bar.add_task("preparing", total=total_bytes)
    return bar


class _ReadingProgress(Progress):
    """A progress bar that looks up, whenever it is drawn, how many bytes the tasks have read."""

    def __init__(self, work: Path):
        self.work = work
        columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=Console(stderr=True), refresh_per_second=2)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Add up the progress files of the tasks, then draw the bar."""
        total = _bytes_read(self.work)
        for task in self.tasks:
            self.update(task.id, completed=total)
        return super().get_renderables()


@contextmanager
def _plain_progress(work: Path, total_bytes: int) -> Iterator[None]:
    done, started = threading.Event(), time.monotonic()

    def speak() -> None:
        while not done.wait(PLAIN_EVERY):
            read = _bytes_read(work)
            elapsed = duration(time.monotonic() - started)
            share = f"{read / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB ({read / max(total_bytes, 1):.0%})"
            print(f"preparing: {share}, {elapsed} elapsed", file=sys.stderr, flush=True)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _bytes_read(work: Path) -> int:
    total = 0
    for file in work.glob("progress-*"):
        try:
            total += int(file.read_text() or 0)
        except (OSError, ValueError):  # the file is being written
            continue
    return total
