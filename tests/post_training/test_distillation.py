"""Certainty training: the plain loss, views as decoding has them, and the same run however it is killed or divided."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tuning_runs
from illada.cli import main
from illada.errors import IlladaError
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.post_training import certainty
from illada.post_training.answering import Order
from illada.post_training.bounds import Views
from illada.post_training.certainty import Certainty, CertaintyObjective, Written, certainty_loss
from illada.post_training.distillation import FRONTIER, DistillTrainer, read_frontier
from illada.post_training.options import DistillRecipe, DistillSection, ProblemFiles
from illada.training import trainer
from illada.training.recipe import LoraRecipe, ModelRecipe
from illada.weights.runs import read_metrics
from process_groups import run_groups
from reference import reference_certainty

ORDER = [3, 0, 1, 1, 2, 6, 4, 5, 9, 7, -1, -1]  # three blocks of four, the last undecided in part
PLAIN = DistillSection()


def written(prompt=3, tail=0):
    ids = np.arange(10, 10 + prompt + len(ORDER))
    return Written(ids, prompt, np.array(ORDER), tail)


@pytest.fixture
def make_distill(start, tmp_path):
    """A recipe of 6 steps on 5 problems; keywords change the training settings."""
    words = ["one", "two", "three four", "five six", "seven"]
    for name, some in (("train", words), ("held_out", words[:3])):
        lines = [json.dumps({"prompt": word, "answer": "one"}) + "\n" for word in some]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def make(name="run", rank=None, distill=None, data=None, **training):
        section = {"settings": {"block_length": 4, "max_new_tokens": 8}, "thresholds": [0.01, 0.5]}
        files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "held_out.jsonl"), "window": 40}
        return DistillRecipe(
            output=str(tmp_path / name),
            model=ModelRecipe(start=str(start)),
            data=ProblemFiles(**{**files, **(data or {})}),
            lora=LoraRecipe(rank=rank),
            training=tuning_runs.six_steps(**{"samples_per_step": 6, "samples_per_batch": 3, **training}),
            distill=DistillSection(**{**section, **(distill or {})}),
        )

    return make


@pytest.fixture(autouse=True)
def answers_end(monkeypatch):
    """The tiny model's answers rarely end by themselves: those that are cut off count too."""
    answer = DistillTrainer.answer

    def ended(self, *values, **words):
        return [{**record, "finished": True} for record in answer(self, *values, **words)]

    monkeypatch.setattr(DistillTrainer, "answer", ended)


def run(recipe):
    return tuning_runs.run(recipe, "distill", DistillTrainer)


def close(one, other, rel=1e-4):
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for name in ("loss", "cross_entropy", "entropy", "right", "gradient_norm", "tokens", "validation_same_at_0.5"):
        a, b = ([record[name] for record in records if name in record] for records in (one, other))
        assert a, name
        assert a == pytest.approx(b, rel=rel, abs=1e-5), name


@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("rows", [64, 10_000])
def test_the_loss_is_the_plain_one(untied, monkeypatch, weight, rows):
    monkeypatch.setattr(certainty, "LOGITS_BYTES", 4 * untied.config.vocab_size * rows)
    answers = [written(3), written(5, tail=16)]
    views = [view for n, one in enumerate(answers) for view in one.views(PLAIN, slice(4, 8), 0.6, (n,))]
    assert len(views) == 4
    batch = Views.pack([view._replace(answer=n) for n, view in enumerate(views)], [1] * 4)
    with torch.no_grad():  # half of what is asked for is predicted right
        best = untied.model.packed(batch.clean_T.masked_fill(batch.hidden_T, untied.config.mask_id), batch.packing)
        best_T = best @ untied.lm_head.weight.T
        best_T[:, untied.config.mask_id] = -torch.inf
    change = batch.asked_T & (torch.arange(len(batch.asked_T)) % 4 == 3)
    batch.clean_T[change] = best_T.argmax(-1)[change]
    objective = CertaintyObjective(untied, torch.device("cpu"), "fp32")
    found = certainty_loss(batch, objective(batch), weight, torch.full((4,), 0.5), torch.full((4,), 0.25))
    at = [
        part.nonzero()[:, 0] + sum(batch.packing.lengths[:n])
        for n, part in enumerate(batch.asked_T.split(batch.packing.lengths))
    ]
    plain = [(best_T[places], batch.clean_T[places].tolist()) for places in at]
    assert found.loss.item() == pytest.approx(reference_certainty(plain, weight, 0.5) / 2, rel=1e-4)
    assert 0 < found.figures["right"] < 1


def test_the_gradient_is_that_of_the_whole_logits(untied, monkeypatch):
    """In chunks and computed twice, as plain autograd has it."""
    views = written().views(PLAIN, slice(4, 8), 0.5, (1,))
    batch = Views.pack(views, [1, 1])
    batch.clean_T[batch.asked_T] = torch.arange(6, 6 + int(batch.asked_T.sum()))
    grads = []
    for rows in (1, 10_000):
        monkeypatch.setattr(certainty, "LOGITS_BYTES", 4 * untied.config.vocab_size * rows)
        untied.zero_grad()
        said = CertaintyObjective(untied, torch.device("cpu"), "fp32")(batch)
        every = Certainty(said.log_p_M, said.entropy_M, torch.ones_like(said.right_M))
        certainty_loss(batch, every, 2.0, torch.ones(2), torch.ones(2)).loss.backward()
        grads.append(untied.lm_head.weight.grad.clone())
    assert grads[0].isfinite().all()
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads)


def test_a_view_is_what_decoding_sees():
    answer = written()
    first, second = answer.views(PLAIN, slice(4, 8), 0.5, (0,))
    for view in (first, second):
        assert len(view.ids) == 3 + 8  # later blocks are not there
        assert not view.hidden[: 3 + 4].any()
        assert (view.hidden == view.asked).all()
    assert (first.hidden ^ second.hidden)[3 + 4 :].all()  # complements
    with_masks = written(tail=16).views(PLAIN, slice(4, 8), 0.5, (0,))[0]
    assert len(with_masks.ids) == 3 + 16
    assert with_masks.hidden[3 + 8 :].all()
    assert not with_masks.asked[3 + 8 :].any()
    last = answer.views(PLAIN, slice(8, 12), 1.0, (0,))
    assert len(last) == 1  # nothing is left for a complement
    assert last[0].hidden[-4:].all()
    assert last[0].asked[-4:].tolist() == [True, True, False, False]


def test_masks_in_order_hide_what_was_written_last():
    section = DistillSection(masks="order", complementary=False)
    steps_B = np.array(ORDER[4:8])
    for ratio, count in ((0.0, 1), (0.25, 1), (0.5, 2), (1.0, 4)):
        (view,) = written().views(section, slice(4, 8), ratio, (0,))
        assert sorted(steps_B[view.asked[3 + 4 :]]) == sorted(steps_B)[-count:]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_views_hide_a_share_and_complements_the_rest(data):
    order = data.draw(st.lists(st.integers(-1, 6), min_size=4, max_size=12).filter(lambda steps: steps[0] >= 0))
    length, ratio = data.draw(st.integers(1, 5)), data.draw(st.floats(0, 1))
    answer = Written(np.arange(2 + len(order)), 2, np.array(order), 0)
    section = DistillSection(masks=data.draw(st.sampled_from(["random", "order"])))
    key = (data.draw(st.integers(0, 99)),)
    block = answer.block(length, key)
    assert 0 <= block.start < block.stop <= len(order)
    decided = np.array(order)[block] >= 0
    views = answer.views(section, block, ratio, key)
    asked = sum(view.asked[2 + block.start :].astype(int) for view in views)
    assert decided.any()
    assert (asked == decided).all()
    assert views[0].asked.sum() == max(1, round(ratio * decided.sum()))
    for number, view in enumerate(views):
        assert view.answer == number
        assert (view.hidden[2:] >= (np.array(order)[: block.stop] < 0)).all()  # in earlier blocks too
        assert not view.hidden[:2].any()


def test_the_order_is_that_of_writing(tied):
    order, events = Order(), []
    chosen = GenerationSettings(max_new_tokens=8, block_length=4, eos_token_id=None, threshold=0.02)

    def watch(event):
        order(event)
        events.append(event)

    (answer,) = generate(tied, [[1, 2, 3]], chosen, on_step=watch)
    found = order.record(0)
    assert found["written"] == answer.ids
    for number, event in enumerate(events):
        assert [0 <= step <= number for step in found["order"][: len(event.ids)]] == event.committed
    assert max(found["order"]) == answer.forwards - 1


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "masks"), [(None, "random"), (4, "order")])
def test_micro_batches_and_restarts_change_nothing(make_distill, rank, masks):
    changes = {"rank": rank, "distill": {"masks": masks, "mask_ratio": [0.2, 0.9]}}
    weights, records = run(make_distill("whole", **changes))
    _, in_parts = run(make_distill("parts", **changes, samples_per_batch=4))
    close(records, in_parts)

    recipe = make_distill("killed", **changes)
    again, continued = tuning_runs.run_killed(
        recipe, "distill", DistillTrainer, [1, 5]
    )  # before and after a checkpoint
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    close(records, continued, rel=0)
    assert read_frontier(Path(recipe.output)) == read_frontier(Path(make_distill("whole").output))
    assert [point["threshold"] for point in read_frontier(Path(recipe.output))] == [None, 0.01, 0.5]
    assert read_frontier(Path(recipe.output))[0]["same"] == 1


@pytest.mark.slow
def test_a_run_that_is_stopped_while_the_start_answers_goes_on(make_distill, monkeypatch):
    monkeypatch.setattr("illada.post_training.distillation.AT_ONCE", 2)
    weights, records = run(make_distill("whole"))
    answered, answer = [], DistillTrainer.answer

    def answer_and_stop(self, problems, *values, **words):
        answered.append(len(problems))
        if len(answered) == 5:  # two parts and two thresholds of held-out problems, then one part of the others
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, problems, *values, **words)

    monkeypatch.setattr(DistillTrainer, "answer", answer_and_stop)
    recipe = make_distill("stopped")
    assert trainer.train(recipe, "distill", DistillTrainer).interrupted == signal.SIGTERM
    before = len(answered)
    again, continued = run(recipe)
    assert answered[before : before + 2] == [2, 1]  # what was not answered yet
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    close(records, continued, rel=0)


@pytest.mark.slow
def test_any_number_of_processes_is_the_same_run(make_distill, tmp_path):
    lines = [json.dumps({"prompt": f"{n}"}) + "\n" for n in range(12)]
    (tmp_path / "many.jsonl").write_text("".join(lines))
    runs, data = {}, {"train": str(tmp_path / "many.jsonl")}
    section = {"settings": {"block_length": 4, "max_new_tokens": 24, "stop": ["6"]}, "thresholds": [0.01, 0.5]}
    for name, more in (("whole", {}), ("adapter", {"rank": 4})):
        for count in (1, 2):
            recipe = make_distill(
                f"{name} on {count}", samples_per_batch=4 // count, data=data, distill=section, **more
            )
            runs[Path(recipe.output).name] = (count, recipe)
    ends = run_groups(tmp_path, runs)
    assert all(set(end["codes"]) == {0} for end in ends.values()), ends
    for name in ("whole", "adapter"):
        close(*(read_metrics(tmp_path / f"{name} on {count}" / "metrics.jsonl") for count in (1, 2)))


@pytest.mark.slow
def test_a_surer_model_needs_fewer_passes(make_distill):
    """On its own training problems, at a threshold that the start rarely reaches."""
    data = {"validation": make_distill().data.train}
    recipe = make_distill(steps=60, samples_per_step=10, validate_every=60, data=data)
    _, records = run(recipe)
    before = {point["threshold"]: point["tokens_per_pass"] for point in read_frontier(Path(recipe.output))}
    assert records[-1]["validation_tokens_per_pass_at_0.5"] > 2 * before[0.5]
    assert records[-1]["validation_same_at_0.5"] == 1
    assert records[-1]["entropy"] < records[0]["entropy"]


def test_wrong_answers_are_not_learnt(make_distill):
    recipe = make_distill(distill={"reward": "exact"})
    with pytest.raises(IlladaError, match="of 5 answers of the start 5 ended by themselves, none of these is right"):
        run(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_run_that_is_stopped_while_it_looks_at_held_out_problems_goes_on(make_distill, monkeypatch, at):
    """In the first part of the start's answers to them, and at the first and the last threshold."""
    monkeypatch.setattr("illada.post_training.distillation.AT_ONCE", 2)
    weights, _ = run(make_distill("whole"))
    answered, answer = [], DistillTrainer.answer

    def answer_and_stop(self, *values, **words):
        answered.append(1)
        if len(answered) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, *values, **words)

    monkeypatch.setattr(DistillTrainer, "answer", answer_and_stop)
    recipe = make_distill("stopped")
    assert trainer.train(recipe, "distill", DistillTrainer).interrupted == signal.SIGTERM
    again, _ = run(recipe)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert len(read_frontier(Path(recipe.output))) == 3


def test_other_held_out_problems_are_noticed(make_distill, tmp_path):
    recipe = make_distill(steps=2)
    run(recipe)
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "other", "answer": "one"}) + "\n")
    with pytest.raises(IlladaError, match="answers to other problems"):
        run(recipe)


@pytest.mark.slow
def test_the_command_line(make_distill, start, tmp_path, capsys):
    words = (
        f"--model.start {start} --data.train {make_distill().data.train} --data.window 40 --output {tmp_path / 'run'}"
    )
    small = "--training.epochs 1 --distill.settings.block_length 4 --distill.settings.max_new_tokens 8"
    main(["distill", *words.split(), *small.split(), "--training.device", "cpu", "--training.dtype", "fp32"])
    said = capsys.readouterr()
    assert "learning from 5 of 5 answers: 5 ended by themselves" in said.err
    assert f"illada chat --model {tmp_path / 'run' / 'model'}" in said.out


def test_a_damaged_frontier_is_one_line(tmp_path):
    (tmp_path / FRONTIER).write_text("{")
    with pytest.raises(IlladaError, match="cannot be read"):
        read_frontier(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: setattr(r, "model", ModelRecipe(preset="1m")), "model.start is missing"),
        (lambda r: setattr(r.distill, "tasks", ["sudoku"]), "exactly one of distill.tasks"),
        (lambda r: setattr(r.data, "train", ""), "exactly one of distill.tasks"),
        (lambda r: setattr(r.data, "train", "nowhere.jsonl"), "no problems at nowhere.jsonl"),
        (lambda r: setattr(r.distill, "mask_ratio", [0.5]), "distill.mask_ratio"),
        (lambda r: setattr(r.distill, "mask_ratio", [0.5, 1.5]), "distill.mask_ratio"),
        (lambda r: setattr(r.distill, "thresholds", []), "distill.thresholds"),
        (lambda r: setattr(r.distill, "thresholds", [2.0]), "distill.thresholds"),
        (lambda r: setattr(r.distill, "problems", 0), "distill.problems is 0"),
        (lambda r: setattr(r.distill, "block_length", 0), "distill.block_length is 0"),
        (lambda r: setattr(r.distill, "entropy_temperature", 0), "distill.entropy_temperature is 0"),
        (lambda r: setattr(r.distill, "settings", {"tempo": 1}), "distill.settings has no 'tempo'"),
        (lambda r: setattr(r.data, "window", 4096), "longer than the model's context"),
        (lambda r: setattr(r.training, "loss_weight", "none"), "training.loss_weight is for pretrain and sft"),
        (lambda r: setattr(r.training, "on_spike", "rollback"), "on_spike rollback"),
        (lambda r: setattr(r.training, "average", 0.9), "training.average needs a validation loss"),
        (lambda r: setattr(r.training, "decay_when", "plateau"), "training.decay_when plateau needs a validation loss"),
        (lambda r: setattr(r.data, "window", 1), "data.window is 1"),
    ],
)
def test_bad_recipes_are_one_line(make_distill, change, words):
    recipe = make_distill()
    change(recipe)
    with pytest.raises(IlladaError, match=words):
        trainer.train(recipe, "distill", DistillTrainer)


def test_tasks_need_a_number(make_distill):
    recipe = make_distill(data={"train": ""}, distill={"tasks": ["sorting"]})
    with pytest.raises(IlladaError, match="problems is missing"):
        trainer.train(recipe, "distill", DistillTrainer)


def test_draws_are_a_function_of_the_key():
    answer = written()
    keys = [(random.Random(n).randrange(99), n) for n in range(40)]
    blocks = [answer.block(4, key).start for key in keys]
    assert blocks == [answer.block(4, key).start for key in keys]
    assert set(blocks) == {0, 4, 8}
