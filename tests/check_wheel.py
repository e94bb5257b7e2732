"""Build the wheel, see that it holds the package and nothing else, and import every module from it alone.

Run by `make package`. Prints one line; exits with 1 and the reason when something is wrong.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

IMPORT_ALL = """
import importlib, sys
from pathlib import Path
target = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(target))
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    found = Path(module.__file__).resolve()
    assert found.is_relative_to(target), f"{name} was imported from {found}, not from the wheel"
import illada
from illada.cli import main
try:
    main(["pretrain", "tiny-cpu-pretrain"])  # the recipe is found: it lacks the data
except SystemExit as end:
    assert end.code == 2, end.code
"""
LACKS = "illada: error: output is missing"


def fail(reason: str) -> None:
    sys.exit(f"check_wheel: {reason}")


def run(words: list[str], cwd: Path, what: str) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{what} failed: {((done.stderr or done.stdout).strip().splitlines() or ['no message'])[-1]}")
    return done.stderr


def check_contents(inside: set[str]) -> list[str]:
    """Compare the wheel's files with the source; return the names of its modules."""
    source = ROOT / "src"
    files = (p.relative_to(source) for p in (source / "illada").rglob("*") if p.is_file())
    wanted = {str(p) for p in files if "__pycache__" not in p.parts}
    wanted |= {f"illada/recipes/{p.name}" for p in (ROOT / "recipes").iterdir()}
    info = {name for name in inside if name.split("/")[0].endswith(".dist-info")}
    package = inside - info
    if missing := sorted(wanted - package):
        fail(f"the wheel lacks {', '.join(missing[:5])}")
    if extra := sorted(package - wanted):
        fail(f"the wheel holds {', '.join(extra[:5])}, which is not part of the package")
    kept = {name.split("/", 1)[1] for name in info}
    if lacking := sorted({"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} - kept):
        fail(f"the wheel's metadata lacks {', '.join(lacking)}")
    modules = (name.removesuffix(".py").removesuffix("/__init__") for name in wanted if name.endswith(".py"))
    # Importing a __main__ would run its command line.
    return sorted(name.replace("/", ".") for name in modules if not name.endswith("__main__"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, target = Path(folder) / "dist", Path(folder) / "installed"
        run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
            ROOT,
            "building the wheel",
        )
        wheels = list(out.glob("*.whl"))
        if len(wheels) != 1:
            fail(f"the build made {len(wheels)} wheels")
        with zipfile.ZipFile(wheels[0]) as wheel:
            modules = check_contents({name for name in wheel.namelist() if not name.endswith("/")})
            wheel.extractall(target)
        # -I: neither the current folder nor PYTHON* variables; the editable install comes after the wheel.
        said = run([sys.executable, "-I", "-c", IMPORT_ALL, str(target), *modules], Path(folder), "importing the wheel")
        if LACKS not in said:
            fail(f"a recipe was not found by its name in the wheel: {said.strip()}")
        size = wheels[0].stat().st_size
        print(f"check_wheel: {wheels[0].name}, {size / 1000:.0f} kB, {len(modules)} modules import from it")


if __name__ == "__main__":
    main()
