"""Task files of lm-evaluation-harness: which tasks a folder or a file holds, and what is wrong with one."""

import functools
from pathlib import Path
from typing import Any

import yaml

from illada.errors import IlladaError, first_line, needs
from illada.files import check_yaml, read_text

with needs("eval", "evaluation"):
    from lm_eval.tasks import TaskManager

TASKS = Path(__file__).with_name("tasks")


class _Loader(yaml.SafeLoader):
    """Reads a task file without calling what it names."""


_Loader.add_multi_constructor("!", lambda _, suffix, node: f"!{suffix} {node.value}")


def folder_of(task_files: str) -> Path:
    """Return the folder of task files that were given as a folder or as one of them."""
    return Path(task_files).parent if Path(task_files).is_file() else Path(task_files)


def task_manager(task_files: str | None) -> TaskManager:
    """Return the tasks in a folder (or that of a file) alone, or all of the harness's and ours.

    Raises:
        IlladaError: when the folder has none, or one of its files cannot be read.
    """
    if task_files is None:
        return _known_tasks()
    folder = folder_of(task_files)
    files = [Path(task_files)] if Path(task_files).is_file() else sorted(folder.rglob("*.yaml"))
    if not files:
        raise IlladaError(f"no task files in {folder}: it must hold the harness's *.yaml")
    # The harness leaves out in silence what it cannot read, hence all are read here.
    holding = [path for path in files if _check_file(path)]
    if not holding:
        raise IlladaError(f"{task_files} names no task: a file must have a line `task: NAME`")
    # The path is made absolute because data sets are read from inside the folder.
    return TaskManager(include_path=str(folder.resolve()), include_defaults=False)


@functools.cache
def _known_tasks() -> TaskManager:
    """Return the harness's tasks and ours; finding them all takes seconds."""
    return TaskManager(include_path=str(TASKS))


def names_in(manager: TaskManager, task_files: str | None) -> list[str]:
    """Return the groups and tasks of a manager; where one task file was given, those of that file.

    Raises:
        IlladaError: when the file names none.
    """
    names = manager.all_groups + manager.all_subtasks
    if task_files is None or not Path(task_files).is_file():
        return names
    path = Path(task_files).resolve()
    own = [name for name in names if getattr(manager.task_index[name], "yaml_path", None) == path]
    if not own:
        raise IlladaError(f"{task_files} names no task of its own: it must have a line `task: NAME`")
    return own


def _check_file(path: Path) -> bool:
    """Say whether a file names a task or a group; others may be there to be included.

    Raises:
        IlladaError: when it, or what it includes, is no task file.
    """
    try:
        text = read_text(path)
        check_yaml(text, aliases=True)
        values: Any = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        if isinstance(error, IlladaError):
            raise
        said = " ".join(str(error).split())
        raise IlladaError(f"{path} is no task file: {said or first_line(error)}") from error
    if not isinstance(values, dict):
        raise IlladaError(f"{path} is no task file: it must hold lines of `key: value`")
    for name in ("task", "group"):
        if name in values and not (name == "task" and "group" in values) and not _is_name(values[name]):
            raise IlladaError(f"{path}: {name} is {str(values[name])[:60]!r}, which is no name: write a text")
    included = values.get("include", [])
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str) or not (path.parent / name).is_file():
            raise IlladaError(f"{path} includes {str(name)[:60]!r}, which is no file: name it relative to this one")
    return not values.keys().isdisjoint(("task", "group", "class"))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.strip()) <= 200
