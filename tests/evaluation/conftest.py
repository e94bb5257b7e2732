import contextlib
from pathlib import Path

import pytest

try:
    import datasets
    from lm_eval import tasks as harness_tasks
except ImportError:  # the extra "eval" is not installed
    collect_ignore_glob = ["test_*.py"]

TASKS = Path(__file__).parent / "tasks"
OF_PAPER = ("arc", "bbh/cot_fewshot", "cmmlu", "gsm8k", "hellaswag", "mmlu", "mmlu-redux", "piqa")
"""Folders of the harness's own tasks that rows of the paper name."""


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory):
    """Local data only, cached where it is thrown away."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    patch.undo()


def know_few_tasks(patch):
    """Of the harness's own tasks, know only those of the paper: to read all its 14,000 files takes seconds."""
    begin = harness_tasks.TaskManager.__init__
    folders = [Path(harness_tasks.__file__).parent / name for name in OF_PAPER]

    def begin_with_few(self, *values, include_path=None, include_defaults=True, **options):
        given = include_path if isinstance(include_path, list) else [include_path] if include_path else []
        paths = folders * include_defaults + given
        begin(self, *values, include_path=paths, include_defaults=False, **options)

    patch.setattr(harness_tasks.TaskManager, "__init__", begin_with_few)


@pytest.fixture(scope="session", autouse=True)
def few_tasks():
    patch = pytest.MonkeyPatch()
    know_few_tasks(patch)
    yield
    patch.undo()


@pytest.fixture
def in_tasks():
    """The folder of the task files, where their data are."""
    with contextlib.chdir(TASKS):
        yield TASKS
