"""A light start: help, usage errors and `import illada` load no heavy library; the Auto classes know the models."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import illada
from illada.cli import COMMANDS
from illada.commands import heavy

HEAVY = ("torch", "transformers", "numpy", "datatrove", "lm_eval", "fastapi", "ray", "matplotlib", "rich")
LOADED = f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
NAMES = [*(name for name, command in COMMANDS.items() if callable(command)), "bench generate", "bench serve"]


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_help_and_usage_errors_load_no_heavy_library():
    wrong = [
        "nonsense", "prepare", "generate", "generate --model m", "score --model m", "export --model m", "convert",
        "compare x", "pretrain", "pretrain --output o --data.train d", "pretrain --training.steps many",
        "sft --output o", "tokenizer --output o", "demo --fast", "bench", "report", "eval --output o",
    ]  # fmt: skip
    calls = [["--help"], *([*name.split(), "--help"] for name in NAMES), *(words.split() for words in wrong)]
    done = python(
        "import contextlib, io, json, sys\n"
        "from illada.cli import main\n"
        f"for words in {calls!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        try:\n"
        "            main(words)\n"
        "        except SystemExit as end:\n"
        "            assert end.code == (0 if '--help' in words else 2), (words, said.getvalue())\n"
        f"    loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "    assert not loaded, (words, loaded)\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_and_says_nothing():
    done = python(f"import illada, json, sys; illada.GenerationSettings(); {LOADED}")
    assert (json.loads(done.stdout), done.stderr) == ([], "")


def test_what_is_imported_late_is_what_the_types_are_checked_against():
    """Both files name each module twice: for static tools, and for the first use."""
    tree = ast.parse(Path(heavy.__file__).read_text())
    static = {
        alias.asname: alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert static == heavy.MODULES
    tree = ast.parse(Path(illada.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {a.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert static == {name: f"illada.{home}" for name, home in illada._HOMES.items()}


@pytest.mark.slow
def test_every_public_name_is_there_and_no_other():
    """Nor is anything else said: optional libraries complain on import of kernels for other machines."""
    done = python("import illada; print([name for name in illada.__all__ if getattr(illada, name, None) is None])")
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert "module 'illada' has no attribute 'generat'" in python("import illada; illada.generat").stderr


ORDERS = (
    "import illada; from transformers import AutoModel",
    "from transformers import AutoModel; import illada",
    "import illada; illada.IlladaForMaskedLM; from transformers import AutoModel",
    "import illada; from transformers import AutoTokenizer, PreTrainedModel, AutoModel",
    "from transformers import PreTrainedModel; import illada; from transformers import AutoModel",
)
KNOWN = """
import illada
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
shape = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
config = AutoConfig.for_model('illada', **shape)
kinds = {type(auto.from_config(config)) for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM)}
assert kinds == {illada.IlladaForMaskedLM}, kinds
"""
FORKED = """
import json, os, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor, torch.nn.attention.varlen
assert not {'illada', 'transformers'} & sys.modules.keys()
ends = []
for script in json.loads(sys.stdin.read()):
    if child := os.fork():
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    code = 1
    try:
        exec(script, {})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
print(json.dumps(ends))
"""
"""Runs each script in a process where torch is imported, since that takes long, and neither illada nor transformers."""


@pytest.mark.slow
def test_the_auto_classes_know_the_model_in_every_order_of_imports():
    scripts = json.dumps([order + KNOWN for order in ORDERS])
    done = subprocess.run([sys.executable, "-c", FORKED], input=scripts, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0] * len(ORDERS), done.stderr
