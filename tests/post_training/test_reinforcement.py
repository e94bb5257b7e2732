"""Reinforcement learning: the plain losses, problems, and the same run however it is cut, killed or divided."""

import json
from pathlib import Path

import pytest
import torch

import tuning_runs
from illada.errors import IlladaError
from illada.post_training.bounds import Answer, Views
from illada.post_training.options import ProblemFiles, RlRecipe, RlSection
from illada.post_training.policy import MASKS, advantages, objective
from illada.post_training.problems import TASKS, Problems
from illada.post_training.reinforcement import RlTrainer
from illada.post_training.rewards import REWARDS
from illada.post_training.rollouts import numbers_of
from illada.toy_tasks import sudoku_is_held_out, sudoku_solutions
from illada.training import trainer
from illada.training.recipe import LoraRecipe, ModelRecipe
from illada.weights.runs import read_metrics
from process_groups import run_groups
from reference import reference_policy


@pytest.fixture
def make_rl(start, tmp_path, monkeypatch):
    """A recipe of 6 steps on two rollouts, rewarded for short answers; keywords change the training settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def short(problem, answer): return 1 / (1 + len(answer))\n")
    words = ["one", "two", "three four"]
    for name in ("train", "held_out"):
        lines = [json.dumps({"prompt": " ".join(words[: 1 + n % 3]), "answer": "one"}) for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def make(name="run", rank=None, rl=None, data=None, **training):
        section = {"reward": "own:short", "answers": 3, "inner_steps": 3, "beta": 0.01}
        section |= {"settings": {"block_length": 4, "max_new_tokens": 8}, "reward_seconds": 60}
        files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "held_out.jsonl"), "window": 40}
        return RlRecipe(
            output=str(tmp_path / name),
            model=ModelRecipe(start=str(start)),
            data=ProblemFiles(**{**files, **(data or {})}),
            lora=LoraRecipe(rank=rank),
            training=tuning_runs.six_steps(**{"samples_per_step": 12, "samples_per_batch": 6, **training}),
            rl=RlSection(**{**section, **(rl or {})}),
        )

    return make


def run(recipe):
    return tuning_runs.run(recipe, "rl", RlTrainer)


def close(one, other, rel=1e-4):
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for name in ("loss", "reward", "kl", "clipped", "answer_tokens", "gradient_norm", "validation_reward", "tokens"):
        a, b = ([record[name] for record in records if name in record] for records in (one, other))
        assert a == pytest.approx(b, rel=rel, abs=1e-5), name


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("method", ["espo", "gdsd", "diffu-grpo"])
def test_the_losses_are_the_plain_ones(method, beta):
    torch.manual_seed(0)
    section = RlSection(method=method, epsilon=0.1, beta=beta, samples=1, complementary=False)
    answers = [Answer(torch.arange(2, 4 + n).numpy(), 2, n) for n in (2, 3, 5)]
    batch = Views.of(answers, 1, False, MASKS[method])
    log_p = -torch.rand(int(batch.asked_T.sum())).requires_grad_()
    lengths, advantage = batch.lengths_A.tolist(), [0.5, -1.0, 0.7]
    if method == "diffu-grpo":
        old, first = log_p.detach() + 0.2 * torch.randn(10), log_p.detach() + 0.2 * torch.randn(10)
        plain = [[part.tolist() for part in values.split([2, 3, 5])] for values in (log_p, old, first)]
    else:
        sums = batch.sums(log_p).detach()
        old, first = sums + torch.randn(3), sums + torch.randn(3)
        plain = [values.tolist() for values in (sums, old, first)]
    weight = batch.lengths_A / batch.lengths_A.sum() if method == "diffu-grpo" else torch.full((3,), 1 / 3)
    found = objective(section, batch, log_p, old, first if beta else None, torch.tensor(advantage), weight)
    expected = reference_policy(method, *plain, advantage, lengths, 0.1, beta if method != "gdsd" else 0.0, 10.0)
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    assert 0 <= found.figures["clipped"] <= 1


def test_advantages_leave_the_answer_itself_out():
    assert advantages(torch.tensor([1.0, 0, 0, 2, 2, 2]), 3).tolist() == [1.0, -0.5, -0.5, 0, 0, 0]
    assert not advantages(torch.full((6,), 0.1), 6).any()  # not a rounding error, which Adam would make a step of


@pytest.mark.parametrize("task", [pytest.param(name, marks=[pytest.mark.slow] * (name == "library")) for name in TASKS])
def test_problems_are_a_function_of_seed_and_number(task, tmp_path):
    problems, again = Problems([task], "", 3), Problems([task], "", 3)
    drawn = [problems[n] for n in range(8)]
    assert drawn == [again[n] for n in range(8)]
    assert drawn != [Problems([task], "", 4)[n] for n in range(8)]
    for problem in drawn:  # the answer that a task gives is right
        assert REWARDS[TASKS[task][1]](problem, problem["answer"]) == 1
    (tmp_path / "test.jsonl").write_text(json.dumps(drawn[0]) + "\n")
    without = Problems([task], "", 3, [str(tmp_path / "test.jsonl")])
    assert drawn[0]["prompt"] not in [without[n]["prompt"] for n in range(8)]
    assert without.fingerprint != problems.fingerprint


def test_sudokus_have_one_solution():
    problems = Problems(["sudoku"], "", 0)
    assert all(len(sudoku_solutions(problems[n]["puzzle"])) == 1 for n in range(20))
    assert not any(sudoku_is_held_out(problems[n]["answer"].replace("\n", "")) for n in range(60))  # of the demo
    assert len(sudoku_solutions("0" * 16)) == 288


def test_a_file_comes_again_in_another_order(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": str(n), "answer": ""}) + "\n" for n in range(9)))
    problems = Problems([], str(tmp_path / "a.jsonl"), 0)
    epochs = [[problems[9 * epoch + n]["prompt"] for n in range(9)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) != epochs[0] != epochs[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["espo", "diffu-grpo"])
def test_answers_without_advantage_may_be_left_out(make_rl, method, monkeypatch):
    """Without rl.beta they pull on nothing: the run is the one that passes over all answers, with fewer tokens."""
    some = {"reward": "own:few", "method": method, "beta": 0.0}
    Path("own.py").write_text("def few(problem, answer): return len(answer) % 2 * 0.1\n")
    short_weights, short = run(make_rl("short", rl=some))
    monkeypatch.setattr(RlTrainer, "pulled", lambda self, rollout: [*range(len(rollout.records))])
    long_weights, long = run(make_rl("long", rl=some))
    assert 0 < short[-1]["zero_groups"] < 1
    assert short[-1].pop("tokens") < long[-1].pop("tokens")
    close(short[-1:], long[-1:])
    for name, tensor in long_weights.items():
        torch.testing.assert_close(short_weights[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_steps_raise_what_is_better_than_the_rest(make_rl):
    """In every rollout the mean of ρ A is 0 at first, and above it after steps on the same answers."""
    _, records = run(make_rl(steps=24, samples_per_step=24, learning_rate=1e-3, rl={"beta": 0, "inner_steps": 8}))
    for first in range(0, 24, 8):
        assert records[first]["loss"] == pytest.approx(0, abs=1e-6)
        assert records[first + 7]["loss"] < -1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rank", "more"),
    [("espo", None, {}), ("gdsd", 4, {}), ("diffu-grpo", 4, {"samples": 1}), ("espo", 4, {})],
)
def test_micro_batches_and_restarts_change_nothing(make_rl, method, rank, more):
    changes = {"rank": rank, "rl": {"method": method, **more}}
    weights, records = run(make_rl("whole", **changes))
    assert numbers_of(Path(make_rl("whole").output)) == [0, 1]
    _, in_parts = run(make_rl("parts", **changes, samples_per_batch=5))
    close(records, in_parts)

    recipe = make_rl("killed", **changes)
    again, continued = tuning_runs.run_killed(
        recipe, "rl", RlTrainer, [1, 5]
    )  # between two steps on the same answers, before and after a checkpoint
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    close(records, continued, rel=0)


@pytest.mark.slow
def test_any_number_of_processes_is_the_same_run(make_rl, tmp_path):
    runs = {}
    for name, more in (("espo", {}), ("adapter", {"rank": 4}), ("tokens", {"rl": {"method": "diffu-grpo"}})):
        for count in (1, 2):
            recipe = make_rl(f"{name} on {count}", steps=4, samples_per_step=15, samples_per_batch=8 // count, **more)
            runs[Path(recipe.output).name] = (count, recipe)
    ends = run_groups(tmp_path, runs)
    assert all(set(end["codes"]) == {0} for end in ends.values()), ends
    for name in ("espo", "adapter", "tokens"):
        close(*(read_metrics(tmp_path / f"{name} on {count}" / "metrics.jsonl") for count in (1, 2)))


@pytest.mark.slow
def test_old_rollouts_make_way(make_rl):
    recipe = make_rl(steps=18, rl={"keep_every": 3}, keep_checkpoints=1)
    run(recipe)
    kept = numbers_of(Path(recipe.output))
    assert kept[:2] == [0, 3]
    assert kept[-1] == 5


@pytest.mark.slow
def test_equal_rewards_are_said(make_rl, capsys):
    run(make_rl(steps=6, rl={"inner_steps": 1, "reward": {"exact": 1.0}}))
    assert "for 5 rollouts all answers to each problem had the same reward (mean 0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: setattr(r, "model", ModelRecipe(preset="1m")), "model.start is missing"),
        (lambda r: setattr(r.rl, "tasks", ["sudoku"]), "exactly one of rl.tasks"),
        (lambda r: setattr(r.data, "train", ""), "exactly one of rl.tasks"),
        (lambda r: setattr(r.data, "train", "nowhere.jsonl"), "no problems at nowhere.jsonl"),
        (lambda r: setattr(r.rl, "reward", None), "rl.reward is missing"),
        (lambda r: setattr(r.rl, "reward", "best"), "no reward 'best'"),
        (lambda r: setattr(r.rl, "reward", "own:most"), "cannot be imported: AttributeError"),
        (lambda r: setattr(r.rl, "answers", 5), "must be a multiple of rl.answers 5"),
        (lambda r: setattr(r.rl, "answers", 1), "rl.answers is 1"),
        (lambda r: setattr(r.rl, "settings", {"tempo": 1}), "rl.settings has no 'tempo'"),
        (lambda r: setattr(r.rl, "settings", {"temperature": -1}), "temperature"),
        (
            lambda r: setattr(r.rl, "settings", {"block_length": "x"}),
            "rl.settings.block_length is 'x': it must be a whole",
        ),
        (lambda r: setattr(r.rl, "exclude", [r.data.train]), "no problem that is not excluded"),
        (lambda r: setattr(r.data, "window", 4), "leaves no room for an answer"),
        (lambda r: setattr(r.data, "window", 4096), "longer than the model's context"),
        (lambda r: setattr(r.training, "on_spike", "rollback"), "on_spike rollback"),
        (lambda r: setattr(r.training, "rule", "llada"), "training.rule is for pretrain and sft"),
        (lambda r: setattr(r.training, "steps", None), "training.steps"),
    ],
)
def test_bad_recipes_are_one_line(make_rl, change, words):
    recipe = make_rl()
    change(recipe)
    with pytest.raises(IlladaError, match=words):
        trainer.train(recipe, "rl", RlTrainer)


def test_problems_that_are_none_are_one_line(tmp_path):
    for line, words in (
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 has no"),
        ('{"question": "a"}', "line 1 has no"),
        ('{"messages": [{"role": 1}]}', "line 1 has no"),
    ):
        (tmp_path / "bad.jsonl").write_text(line + "\n")
        with pytest.raises(IlladaError, match=words):
            Problems([], str(tmp_path / "bad.jsonl"), 0)
    with pytest.raises(IlladaError, match="no task 'chess'"):
        Problems(["chess"], "", 0)
