"""The plan of the house: imports go one way, nothing hides inside functions, what is called the core is small."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "illada"
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = ("errors", "files", "rng", "devices", "text", "model", "diffusion", "data", "training", "generation", "scoring")
"""Modules and rooms that the README calls the core; the folders `optional` are not part of it."""
LONG_FOR_A_REASON: dict[str, str] = {}
"""Functions of 60 lines or more, with the reason why each is better long."""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    environment = {"PYTHONPATH": str(folder / "src"), "PATH": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_imports_go_one_way():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "wrong", "says"),
    [
        ("model/config.py", "import illada.training.recipe", "illada.model is not allowed to import illada.training"),
        ("generation/settings.py", "def late():\n    import illada.scoring.layout", "illada.generation is not allowed"),
        ("model/released.py", "import illada.model.config", "No circles, not even inside a room BROKEN"),
        ("new_room.py", "", "new_room"),
    ],
)
def test_a_wrong_import_is_noticed(tmp_path, module, wrong, says):
    shutil.copytree(PACKAGE, tmp_path / "src" / "illada", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "src" / "illada" / module).open("a") as file:
        file.write(f"\n\n{wrong}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert says in done.stdout + done.stderr


def is_needs(node: ast.AST) -> bool:
    """Whether this is `with needs(extra, purpose):`, which guards the import of an optional package."""
    return isinstance(node, ast.With) and any(
        isinstance(item.context_expr, ast.Call) and getattr(item.context_expr.func, "id", "") == "needs"
        for item in node.items
    )


def hidden_imports(node: ast.AST, inside: bool = False) -> list[int]:
    """Return the lines of imports inside functions that no `needs` guards."""
    if is_needs(node):
        return []
    if inside and isinstance(node, ast.Import | ast.ImportFrom):
        return [node.lineno]
    inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return [line for child in ast.iter_child_nodes(node) for line in hidden_imports(child, inside)]


def test_no_import_hides_in_a_function():
    hidden = {str(path.relative_to(PACKAGE)): hidden_imports(ast.parse(path.read_text())) for path in FILES}
    assert {path: lines for path, lines in hidden.items() if lines} == {}
    assert hidden_imports(ast.parse("def f():\n    if x:\n        import y")) == [3]
    assert hidden_imports(ast.parse("def f():\n    with needs('a', 'b'):\n        import y\nimport z")) == []


def test_functions_are_short():
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines >= 60:
                    long[f"{path.relative_to(PACKAGE)}:{node.name}"] = lines
    assert long.keys() == LONG_FOR_A_REASON.keys(), long


def test_the_core_is_an_evening():
    """It was 6,000 lines before the exact likelihood of decoding rules, shifted windows and models without a mask.

    And 6,400 before penalties, biases and alternatives, and before strangers' files were read with care.
    """
    rooms = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    core = [path for path, room in rooms.items() if room in CORE and "optional" not in path.parts]
    assert sum(len(path.read_text().splitlines()) for path in core) <= 6_500
