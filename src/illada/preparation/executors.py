"""Carry out the stages of a preparation on processes of this machine, on Ray or on Slurm.

All of them skip finished tasks when a preparation is continued.
"""

import copy
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from illada.errors import IlladaError, first_line
from illada.preparation.filters import Stage


def run_locally(stages: Sequence[Stage], log: Path, workers: int) -> None:
    """Run stages in processes of this machine.

    Raises:
        IlladaError: when a worker is killed, or what a task raises.
    """
    from datatrove.executor import LocalPipelineExecutor

    pool: ProcessPoolExecutor | None = None
    workers = min(workers, max(stage.tasks for stage in stages))
    if workers > 1:
        context = get_context("forkserver")
        # The slow imports happen once, before the workers are forked.
        context.set_forkserver_preload(["illada.preparation.steps", "illada.preparation.filters"])
        pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        with _quiet():
            for stage in stages:
                executor = LocalPipelineExecutor(stage.steps, tasks=stage.tasks, logging_dir=str(log / stage.name))
                # Not executor.run(): it starts a manager process that outlives a killed run for ever, and waits for
                # ever when a worker is killed.
                ranks = executor.get_incomplete_ranks()
                if pool is None:
                    for rank in ranks:
                        # A copy: the steps count what they did.
                        copy.deepcopy(executor)._run_for_rank(rank)
                    continue
                for future in as_completed([pool.submit(_in_worker, executor, rank) for rank in ranks]):
                    future.result()
    except BrokenProcessPool:
        raise IlladaError(
            "a worker was killed, perhaps for want of memory: prepare again with fewer workers to continue"
        ) from None
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _in_worker(executor: Any, rank: int) -> None:
    with _quiet():
        executor._run_for_rank(rank)


def run_on_ray(stages: Sequence[Stage], log: Path, workers: int, memory_gb: int) -> None:
    """Run stages on the Ray cluster of RAY_ADDRESS or of this machine, or on Ray started here with so many CPUs.

    Raises:
        IlladaError: when Ray is not installed, or the first of the tasks' errors.
    """
    try:
        import ray
    except ImportError:
        raise IlladaError("executor ray needs Ray: pip install 'illada[cluster]'") from None
    from datatrove.executor import RayPipelineExecutor

    started = not ray.is_initialized()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _quiet():
        if started:
            try:
                try:
                    ray.init(address="auto", **options)
                except ConnectionError:
                    ray.init(address="local", num_cpus=workers, include_dashboard=False, **options)
            except Exception as error:  # bare ones too
                raise IlladaError(
                    f"Ray cannot be used here ({first_line(error)}): check RAY_ADDRESS, or use executor local"
                ) from error
        try:
            for stage in stages:
                executor = RayPipelineExecutor(
                    stage.steps,
                    tasks=stage.tasks,
                    workers=workers,
                    logging_dir=str(log / stage.name),
                    mem_per_cpu_gb=memory_gb,
                )
                executor.run()
                # A task that failed does not fail the run.
                if missing := executor.get_incomplete_ranks():
                    raise IlladaError(_why(log / stage.name, missing[0]))
        finally:
            if started:
                ray.shutdown()


def submit_to_slurm(
    stages: Sequence[Stage],
    log: Path,
    workers: int,
    partition: str,
    time: str,
    memory_gb: int,
    options: Sequence[str],
) -> str:
    """Submit the stages as array jobs, each waiting for the one before; returns the number of the last job.

    Raises:
        IlladaError: when this is no Slurm cluster, or the jobs are refused.
    """
    import subprocess

    from datatrove.executor import SlurmPipelineExecutor

    if shutil.which("sbatch") is None:
        raise IlladaError("there is no sbatch here: run this on a login node of a Slurm cluster, or use executor local")
    given = {name: value for name, _, value in (option.lstrip("-").partition("=") for option in options)}
    before: Any = None
    with _quiet():
        for stage in stages:
            before = SlurmPipelineExecutor(
                stage.steps,
                tasks=stage.tasks,
                workers=workers,
                partition=partition,
                time=time,
                mem_per_cpu_gb=memory_gb,
                job_name=f"illada-{stage.name}",
                # The site's own default; "normal", datatrove's, does not exist everywhere.
                qos=given.get("qos", ""),
                sbatch_args=given,
                # The programs that the jobs call stand beside this Python.
                env_command=f"export PATH={os.path.dirname(sys.executable)}:$PATH",
                logging_dir=str(log / stage.name),
                depends=before,
            )
        try:
            before.run()
        except subprocess.CalledProcessError as error:
            raise IlladaError(
                f"sbatch refused the job (exit code {error.returncode}; its message is above): check partition, time "
                "and slurm_options"
            ) from None
    return str(before.job_id)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence datatrove, which logs every task to the terminal; one progress line says enough."""
    from datatrove.utils.logging import logger

    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")


def _why(log: Path, rank: int) -> str:
    """Return what the log of a task says of its failure."""
    file = log / "logs" / f"task_{rank:05d}.log"
    text = file.read_text(errors="replace") if file.exists() else ""
    said = re.findall(r"^(?:[\w.]*\.)?(\w*(?:Error|Exception)): (.*)", text, flags=re.MULTILINE)
    if not said:
        return f"task {rank} did not finish, its log is {file}: prepare again to continue"
    kind, message = said[-1]
    return message if kind == "IlladaError" else f"task {rank} failed ({kind}: {message}): see {file}"


@contextmanager
def progress(work: Path, total: int) -> Iterator[None]:
    """Show the bytes read by all tasks in one line, if someone is looking."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    ended = threading.Event()
    with Progress(*columns, console=Console(stderr=True)) as shown:
        bar = shown.add_task("preparing", total=total)

        def look() -> None:
            while not ended.wait(0.5):
                shown.update(bar, completed=_bytes_read(work))

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            shown.update(bar, completed=_bytes_read(work))


def _bytes_read(work: Path) -> int:
    total = 0
    for file in work.glob("progress-*"):
        try:
            total += int(file.read_text() or 0)
        except (OSError, ValueError):  # being written
            continue
    return total
