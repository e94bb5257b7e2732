"""The authors' own task files, read from the user's checkout of their repository (`illada eval --authors_tasks`).

They belong to a fork of lm-evaluation-harness 0.4.8 (`eval_instruct/`, spec §7), whose tasks import modules of that
fork and the package `evaluate`, which would fetch the code that runs programs. Here the installed harness runs the
tasks, and our sandbox the programs.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from illada.errors import IlladaError, needs
from illada.evaluation.sandbox import passes

with needs("eval", "evaluation"):
    import lm_eval.tasks

TASKS = Path("eval_instruct", "lm_eval", "tasks")


def tasks_folder(checkout: str) -> Path:
    """Return the folder of task files in a checkout of the authors' repository.

    Raises:
        IlladaError: when it is not there.
    """
    folder = Path(checkout).resolve() / TASKS
    if not (folder / "gsm8k" / "gsm8k-cot-reasoning.yaml").is_file():
        raise IlladaError(
            f"{checkout} has no {TASKS}/gsm8k/gsm8k-cot-reasoning.yaml: give a checkout of the authors' repository "
            "(ML-GSAI/LLaDA) that holds iLLaDA's evaluation"
        )
    return folder


@contextlib.contextmanager
def their_imports(folder: Path) -> Iterator[None]:
    """Let task files of `folder` find the fork's modules below `lm_eval.tasks`, and `evaluate`'s code_eval in us.

    What tasks print while they are loaded and run goes to stderr, because stdout is the table's.
    """
    package: Any = lm_eval.tasks
    measures: Any = ModuleType("evaluate")
    measures.load = _load
    saved = sys.modules.get("evaluate")
    package.__path__.append(str(folder))
    sys.modules["evaluate"] = measures
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        package.__path__.remove(str(folder))
        del sys.modules["evaluate"]
        if saved is not None:
            sys.modules["evaluate"] = saved


class CodeEval:
    """The measure "code_eval" of the package `evaluate`, as far as tasks use it: pass@1 of one program a document."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[int, Any]]:
        """Return ({"pass@1": share of programs that pass their tests}, {}).

        Raises:
            IlladaError: when another k is asked for.
        """
        if list(k) != [1]:
            raise IlladaError(f"pass@{k} cannot be computed here, only pass@1")
        passed = [
            sum(passes(f"{program}\n{tests}") for program in programs) / len(programs)
            for tests, programs in zip(references, predictions, strict=True)
        ]
        return {"pass@1": sum(passed) / len(passed)}, {}


def _load(name: str, *_: Any, **__: Any) -> CodeEval:
    """Return the measure called `name`, as `evaluate.load` does.

    Raises:
        IlladaError: when it is not code_eval.
    """
    if name != "code_eval":
        raise IlladaError(f"the authors' tasks ask for the measure {name!r}: only code_eval is known here")
    return CodeEval()
