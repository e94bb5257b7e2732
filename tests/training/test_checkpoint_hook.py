"""A command on every checkpoint, beside the training."""

import shlex
import sys
from pathlib import Path

import pytest

from illada.errors import IlladaError
from illada.training.optional.checkpoint_hook import CheckpointHook
from illada.training.trainer import train

WRITE = "import os, sys; print(sys.argv[1:], os.path.isdir(sys.argv[1] + '/about'), 'RANK' in os.environ)"


def command(code, *words):
    return shlex.join([sys.executable, "-c", code, *words]).replace("'{checkpoint}'", "{checkpoint}")


def test_checkpoints_are_evaluated_and_the_last_one_always(make_recipe, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    recipe = make_recipe(checkpoint_every=10)
    recipe.log.evaluate = command(WRITE, "{checkpoint}", "{run}", "{step}")
    train(recipe)
    run = Path(recipe.output)
    last = run / "checkpoints" / "step-00000030"
    assert (run / "evaluations" / f"{last.name}.log").read_text() == f"{[str(last), str(run), '30']} True False\n"
    assert f"evaluation of {last.name} done" in capsys.readouterr().err


def test_one_at_a_time_and_what_is_looked_at_stays(tmp_path):
    (tmp_path / "go").mkdir()
    wait = "import pathlib, sys\nwhile not pathlib.Path(sys.argv[1]).exists(): pass\nsys.exit(3)"
    with CheckpointHook(tmp_path, command(wait, str(tmp_path / "go" / "now"))) as hook:
        first, second, last = (tmp_path / f"step-{n}" for n in (1, 2, 3))
        hook.begin(first)
        hook.begin(second)
        assert hook.current == first
        assert hook.messages() == []
        (tmp_path / "go" / "now").touch()
        said = hook.finish(last)
        assert [line.split(":")[0] for line in said] == [f"evaluation of step-{n} failed with code 3" for n in (1, 3)]
        assert hook.current is None
    assert not (tmp_path / "evaluations" / "step-2.log").exists()


def test_an_evaluation_ends_with_a_run_that_is_stopped(tmp_path):
    with CheckpointHook(tmp_path, command("while True: pass")) as hook:
        hook.begin(tmp_path / "step-1")
    assert hook.finish(tmp_path / "step-1")[0].startswith("evaluation of step-1 failed with code -15")


@pytest.mark.parametrize(
    ("command", "says"), [("no-such-command {step}", "no command 'no-such-command'"), ("ls {what}", "may hold {run}")]
)
def test_a_command_that_cannot_be_run_is_refused_at_the_start(make_recipe, command, says):
    recipe = make_recipe()
    recipe.log.evaluate = command
    with pytest.raises(IlladaError, match=says):
        train(recipe)
    assert not Path(recipe.output).exists()
