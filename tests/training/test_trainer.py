import fcntl
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from illada.data.shards import Shards
from illada.diffusion.noise import EPSILON, PAPER, Noise
from illada.errors import DivergedError, IlladaError
from illada.training import parallel, trainer
from illada.training.checkpoint import Checkpoints
from illada.training.log import StepLog
from illada.training.parallel import join
from illada.training.setup import Run
from illada.training.trainer import train
from illada.training.validation import bits_per_byte, validation_bound
from illada.weights.runs import assemble, checkpoints, read_metrics


class Killed(BaseException):
    """Stands for the end of the process: nothing in the trainer handles it."""


MACHINE = {"tokens_per_second": 0, "memory_gb": 0}  # what two equal runs may differ in
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def weights(run, at="model"):
    return load_file(Path(run) / at / "model.safetensors")


def held(checkpoint):
    """Weights and moments of a checkpoint that one process wrote."""
    return load_file(checkpoint / SHARD)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps_of(run):
    return [record["step"] for record in read_metrics(Path(run) / "metrics.jsonl")]


def kill_after(monkeypatch, step):
    """End the run once `step` is in the metrics, before anything of it is saved."""
    write = StepLog.write

    def write_and_die(self, number, **values):
        write(self, number, **values)
        if number == step:
            raise Killed

    monkeypatch.setattr(StepLog, "write", write_and_die)


def train_killed_at(recipe, *steps):
    for step in steps:
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, step)
            with pytest.raises(Killed):
                train(recipe)
    return train(recipe)


@pytest.mark.slow
def test_the_loss_falls_and_the_run_is_complete(make_recipe, data, tmp_path):
    recipe = make_recipe(validation="held_out", steps=120, decay_steps=12, validate_every=50, learning_rate=1e-2)
    result = train(recipe)
    run = Path(recipe.output)
    assert (result.model, result.interrupted) == (run / "model", None)
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 121))
    assert [r["tokens"] for r in records] == [step * 4 * 32 for step in range(1, 121)]
    first, last = (sum(r["loss"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.6 * first
    assert records[0]["learning_rate"] == pytest.approx(1e-2 / 3)
    assert records[60]["learning_rate"] == 1e-2
    assert records[-1]["learning_rate"] == pytest.approx(1e-4)
    tested = {r["step"]: r for r in records if "validation_loss" in r}
    assert list(tested) == [50, 100, 120]  # and once more at the end
    held_out = Shards.open(data / "held_out")
    model = AutoModelForMaskedLM.from_pretrained(run / "model")
    bound = validation_bound(model, held_out, 32, 256, 2)
    assert tested[120]["validation_loss"] == pytest.approx(bound, rel=1e-6)
    bits = bits_per_byte(bound, held_out.tokens, held_out.bytes)
    assert tested[120]["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert tested[120]["validation_loss"] < tested[50]["validation_loss"]
    assert [path.name for path in checkpoints(run)] == ["step-00000119", "step-00000120"]
    assert not [path for path in run.rglob("*") if "partial" in path.name]
    assert (run / "model" / "tokenizer.json").is_file()
    again = train(recipe)
    last = held(checkpoints(run)[-1])
    assert same(weights(run), {name: tensor for name, tensor in last.items() if "/" not in name})
    assert len(last) == 3 * len(weights(run))  # and two moments each
    assert assemble(checkpoints(run)[-1], tmp_path) == tmp_path / "model"
    assert same(weights(run), weights(tmp_path))
    for file in ("model/model.safetensors", "model/config.json", "model/tokenizer.json"):
        assert (run / file).stat().st_mode == (run / "recipe.yaml").stat().st_mode, file
    assert again.model == run / "model"
    assert steps_of(run) == list(range(1, 121))


OTHER_NOISE = {"noise": "bell", "mask_range": [0.2, 0.9], "loss_weight": "none", "complementary": True}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"shift": True}, OTHER_NOISE, {"average": 0.9}, {"dropout": 0.2}])
def test_a_run_killed_anywhere_ends_in_the_same_weights(make_recipe, options):
    """The 30 steps are several epochs, so the run dies in the middle of some."""
    options = dict(options)
    shift = options.pop("shift", False)
    whole = make_recipe("whole", "train", "held_out", **options)
    killed = make_recipe("killed", "train", "held_out", **options)
    whole.data.shift_windows = killed.data.shift_windows = shift
    train(whole)
    train_killed_at(killed, 3, 7, 16, 20, 30)
    assert same(weights(whole.output), weights(killed.output))
    assert same(*(held(checkpoints(Path(recipe.output))[-1]) for recipe in (whole, killed)))
    assert steps_of(killed.output) == list(range(1, 31))
    for a, b in zip(*(read_metrics(Path(r.output) / "metrics.jsonl") for r in (whole, killed)), strict=True):
        assert {**a, **MACHINE} == {**b, **MACHINE}


def test_seeds_differ_and_equal_seeds_do_not(make_recipe):
    runs = [make_recipe(str(n), steps=4, seed=n % 2) for n in range(3)]
    torch.manual_seed(5)
    train(runs[0])
    state = torch.random.get_rng_state()
    train(runs[1])
    assert torch.equal(torch.random.get_rng_state(), state)  # and the caller's random state is left alone
    train(runs[2])
    assert same(weights(runs[0].output), weights(runs[2].output))
    assert not same(weights(runs[0].output), weights(runs[1].output))


def test_micro_batches_change_nothing_beyond_rounding(make_recipe):
    found = []
    for size in (1, 3, 4):
        recipe = make_recipe(f"batch-{size}", steps=6, samples_per_batch=size)
        train(recipe)
        found.append(([r["loss"] for r in read_metrics(Path(recipe.output) / "metrics.jsonl")], weights(recipe.output)))
    for loss, weight in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        for name, value in weight.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(make_recipe, recompute, dropout):
    plain, saving = (make_recipe(name, steps=4, dropout=dropout) for name in ("plain", "saving"))
    saving.parallel.recompute = recompute
    for recipe in (plain, saving):
        train(recipe)
    assert same(weights(plain.output), weights(saving.output))


def test_the_gradient_is_clipped(make_recipe, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def look(self, *args):
        seen.append(float(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    for name, clip in (("clipped", 0.01), ("free", 0.0)):
        recipe = make_recipe(name, steps=3, gradient_clip=clip)
        train(recipe)
        norms = [r["gradient_norm"] for r in read_metrics(Path(recipe.output) / "metrics.jsonl")]
        assert min(norms) > 0.1  # what is reported is the norm before clipping
        assert seen == pytest.approx([0.01] * 3 if clip else norms, rel=1e-3)
        seen.clear()


def test_weight_decay_spares_the_norm_gains(make_recipe):
    ends = []
    for decay in (0.0, 0.5):
        recipe = make_recipe(f"decay-{decay}", steps=1, warmup_steps=0, weight_decay=decay)
        train(recipe)
        ends.append(weights(recipe.output))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]) == ("norm" in name), name


# The decay, called by hand or by the plateau rule


@pytest.mark.slow
def test_a_file_begins_the_decay_and_a_killed_run_decays_at_the_same_step(make_recipe):
    write = StepLog.write

    def write_and_ask(self, number, **values):
        write(self, number, **values)
        if number == 10:
            (self.path.parent / "DECAY").touch()

    ends = []
    for name, kills in (("whole", ()), ("killed", (9, 12, 15))):
        recipe = make_recipe(name)
        run = Path(recipe.output)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepLog, "write", write_and_ask)
            train_killed_at(recipe, *kills)
        rates = [r["learning_rate"] for r in read_metrics(run / "metrics.jsonl")]
        assert len(rates) == 16
        assert rates[9] == 3e-3 > rates[10]
        assert rates[-1] == pytest.approx(1e-4)
        assert (run / "DECAY").read_text() == "10\n"
        ends.append(weights(run))
    assert same(*ends)


@pytest.mark.slow
def test_a_plateau_begins_the_decay_also_across_a_kill(make_recipe, monkeypatch):
    settings = {"decay_when": "plateau", "plateau_patience": 2, "plateau_delta": 0.01, "validate_every": 4}
    for name, kills in (("whole", ()), ("killed", (16, 18))):
        # Steps 4, 8, 12, 16: nothing better after 8, so the decay begins at 16 and ends the run at 22.
        # A killed run sees steps 16 and later a second time.
        seen = [5.0, 4.0, 4.0, 3.99, *[3.99] * len(kills), 3.0, 3.0]
        monkeypatch.setattr(trainer.Trainer, "validation_loss", lambda *_, seen=seen: seen.pop(0))
        recipe = make_recipe(name, "train", "held_out", **settings)
        train_killed_at(recipe, *kills)
        records = read_metrics(Path(recipe.output) / "metrics.jsonl")
        assert len(records) == 22
        assert records[15]["learning_rate"] == 3e-3 > records[16]["learning_rate"]
        assert records[-1]["learning_rate"] == pytest.approx(1e-4)
    with pytest.raises(IlladaError, match=r"training\.validate_every differ"):
        train(make_recipe("killed", "train", "held_out", **{**settings, "validate_every": 5}))


def test_a_request_to_decay_comes_too_late_when_the_decay_is_on(make_recipe):
    recipe = make_recipe(steps=8, decay_steps=4, checkpoint_every=5)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            train(recipe)
    (Path(recipe.output) / "DECAY").touch()
    train(recipe)
    assert steps_of(recipe.output) == list(range(1, 9))


# What goes wrong


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(make_recipe, monkeypatch, bad):
    recipe = make_recipe()
    honest, calls = parallel.masked_loss, []

    def poisoned(*args):
        calls.append(1)
        loss = honest(*args)
        return loss * bad if len(calls) == 2 * 16 else loss  # the second half of step 16

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "masked_loss", poisoned)
        with pytest.raises(DivergedError, match="step-00000014") as caught:
            train(recipe)
    assert "\n" not in str(caught.value)
    assert "training.learning_rate" in str(caught.value)
    assert [path.name for path in checkpoints(Path(recipe.output))] == ["step-00000007", "step-00000014"]
    assert not (Path(recipe.output) / "model").exists()
    whole = make_recipe("whole")
    train(whole)
    train(recipe)  # the checkpoint was good: without the poison the run goes on to the same end
    assert same(weights(recipe.output), weights(whole.output))


def test_divergence_before_any_checkpoint_says_so(make_recipe, monkeypatch):
    monkeypatch.setattr(parallel, "masked_loss", lambda model, *_: model.lm_head.weight.sum() * math.nan)
    with pytest.raises(DivergedError, match="no good checkpoint"):
        train(make_recipe())


@pytest.mark.slow
def test_a_half_written_checkpoint_is_ignored(make_recipe):
    recipe = make_recipe()
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 16)
        with pytest.raises(Killed):
            train(recipe)
    run = Path(recipe.output)
    partial = run / "checkpoints" / ".step-00000021.partial"
    shutil.copytree(run / "checkpoints" / "step-00000014", partial)
    (partial / SHARD).write_bytes(b"half")
    (partial / "state.json").unlink()
    whole = make_recipe("whole")
    train(whole)
    train(recipe)
    assert same(weights(run), weights(whole.output))
    assert not partial.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.learning_rate", 1.0),
        ("training.seed", 9),
        ("training.steps", 31),
        ("data.split_probability", 0.5),
        ("model.hidden_size", 64),
        ("data.boundaries", "document"),
        ("data.shift_windows", True),
        ("training.average", 0.99),
        ("training.dropout", 0.1),
        ("training.noise", "bell"),
        ("training.mask_range", [0.3, 0.8]),
        ("training.loss_weight", "none"),
        ("training.complementary", True),
    ],
)
def test_a_run_folder_belongs_to_its_recipe(make_recipe, key, value):
    train(make_recipe(steps=2))
    part, name = key.split(".")
    changed = make_recipe(steps=2)
    setattr(getattr(changed, part), name, value)
    with pytest.raises(IlladaError, match=rf"another recipe \({key} differ\)"):
        train(changed)


def test_a_run_from_before_later_keys_can_be_continued(make_recipe):
    recipe = make_recipe(steps=2)
    train(recipe)
    stored = (Path(recipe.output) / "recipe.yaml").read_text()
    for name in ("shift_windows", *OTHER_NOISE, "average", "dropout"):
        assert name not in stored
    train(recipe)
    other = make_recipe("other", steps=2, **OTHER_NOISE)
    train(other)
    for name, value in yaml.safe_load((Path(other.output) / "recipe.yaml").read_text())["training"].items():
        assert value == OTHER_NOISE.get(name, value)
    assert steps_of(train(other).model.parent) == [1, 2]


@pytest.mark.slow
def test_noise_concerns_training_alone(make_recipe):
    """Validation measures the paper's bound whatever training does; the data of an epoch take as many steps."""
    records = []
    options = ({}, {"noise": "bell"}, {"mask_range": [0.3, 0.8]}, {"loss_weight": "none"}, {"complementary": True})
    for number, noise in enumerate(options):
        still = {"steps": None, "epochs": 0.3, "learning_rate": 0.0, "final_learning_rate": 0.0, "validate_every": 1}
        recipe = make_recipe(str(number), validation="held_out", **still, **noise)
        train(recipe)
        records.append(read_metrics(Path(recipe.output) / "metrics.jsonl"))
    assert len({json.dumps([r["validation_loss"] for r in record]) for record in records}) == 1
    assert len({json.dumps([r["tokens"] for r in record]) for record in records}) == 1
    assert len({json.dumps([r["loss"] for r in record]) for record in records}) == len(options)


@pytest.mark.parametrize(
    ("options", "noise"),
    [
        ({}, PAPER),
        (OTHER_NOISE, Noise(True, (0.2, 0.9), "none", True)),
        ({"loss_weight": "bound", "noise": "bell"}, Noise(True, (EPSILON, 1), "bound")),
        # The chances of both views lie between EPSILON and 1 - EPSILON, so that no weight is above 1/EPSILON.
        ({"complementary": True}, Noise(band=(EPSILON, 1 - EPSILON), complementary=True)),
    ],
)
def test_the_noise_is_the_recipes(make_recipe, options, noise):
    with join("cpu") as processes:
        assert Run(make_recipe(**options), processes).batches.noise == noise


@pytest.mark.parametrize(("name", "value"), OTHER_NOISE.items())
def test_a_causal_model_has_no_noise(make_recipe, name, value):
    """Named in the recipe, or found in the checkpoint to start from."""
    causal = make_recipe("causal", steps=1)
    causal.model.causal = True
    usual = {"noise": "uniform", "mask_range": "null", "loss_weight": "1/p", "complementary": "false"}[name]
    words = rf"^training\.{name} is about masks, a causal model has none: set it to {usual}$"
    wrong = make_recipe("wrong", **{name: value})
    wrong.model.causal = True
    refused(wrong, words)
    refused(make_recipe("wrong", start=train(causal).model, **{name: value}), words)


def test_shifting_concerns_training_alone(make_recipe):
    """Validation text is cut as ever, and an epoch has as many steps: with a rate of 0 nothing else can differ."""
    records = []
    for shift in (False, True):
        still = {"steps": None, "epochs": 0.3, "learning_rate": 0.0, "final_learning_rate": 0.0, "validate_every": 1}
        recipe = make_recipe(str(shift), validation="held_out", **still)
        recipe.data.shift_windows = shift
        train(recipe)
        records.append(read_metrics(Path(recipe.output) / "metrics.jsonl"))
    fixed, shifted = records
    assert [r["validation_loss"] for r in fixed] == [r["validation_loss"] for r in shifted]
    assert [r["loss"] for r in fixed] != [r["loss"] for r in shifted]


@pytest.mark.slow
def test_what_does_not_change_the_weights_may_change(make_recipe):
    whole, killed = make_recipe("whole"), make_recipe("killed")
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 17)
        with pytest.raises(Killed):
            train(killed)
    train(make_recipe("killed", checkpoint_every=4, keep_checkpoints=1, validate_every=3))
    assert same(weights(whole.output), weights(killed.output))
    assert len(checkpoints(Path(killed.output))) == 1


def test_other_data_of_the_same_name_is_refused(make_recipe, make_data, tiny_tokenizer, tmp_path):
    recipe = make_recipe(steps=2)
    recipe.data.train = str(tmp_path / "text")
    make_data(tmp_path / "text", [[9] * 200], tiny_tokenizer)
    train(recipe)
    shutil.rmtree(tmp_path / "text")
    make_data(tmp_path / "text", [[9] * 300], tiny_tokenizer)
    with pytest.raises(IlladaError, match="data_fingerprint"):
        train(recipe)


def refused(recipe, words):
    with pytest.raises(IlladaError, match=words) as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    assert not Path(recipe.output).exists()


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(make_recipe, make_data, tiny_tokenizer, tmp_path, data):
    refused(make_recipe(validation="other"), "another tokenizer")
    refused(make_recipe(train="missing"), "no prepared data")
    refused(make_recipe(window=65), "longer than the model's context 64")
    refused(make_recipe(device="nonsense"), "device nonsense")
    refused(make_recipe(start=tmp_path / "missing"), "no model at")
    refused(make_recipe(rule="llada"), "--kind chat")
    examples = make_recipe(train="chat", rule="llada")
    examples.data.shift_windows = True
    refused(examples, r"^data\.shift_windows moves windows, training\.rule llada has none: leave one of them out$")
    bad = make_recipe()
    bad.model.hidden_size = 30
    refused(bad, "not a multiple")
    make_data(tmp_path / "short", [[9] * 20], tiny_tokenizer)
    short = make_recipe()
    short.data.train = str(tmp_path / "short")
    refused(short, "less than one window of 32")
    make_data(tmp_path / "empty", [], tiny_tokenizer)
    empty = make_recipe(validation="held_out")
    empty.data.validation = str(tmp_path / "empty")
    refused(empty, "no tokens")
    shutil.copytree(data / "train", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "tokenizer")
    bare = make_recipe()
    bare.data.train = str(tmp_path / "bare")
    refused(bare, "tokenizer")


def test_an_output_that_is_something_else_is_left_alone(make_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(IlladaError, match="not empty and holds no run"):
        train(make_recipe())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IlladaError, match="choose another --output"):
        train(make_recipe("file"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_two_trainers_do_not_share_a_folder(make_recipe):
    recipe = make_recipe(steps=2)
    train(recipe)
    with (Path(recipe.output) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(IlladaError, match=r"another process trains in .*run: wait for its end"):
            train(recipe)
    train(recipe)


@pytest.mark.slow
def test_the_newest_checkpoints_are_kept_and_those_of_every_so_many_steps(make_recipe):
    recipe = make_recipe(steps=32, checkpoint_every=4, keep_checkpoints=2, keep_every=12)
    train(recipe)
    kept = [path.name for path in checkpoints(Path(recipe.output))]
    assert kept == ["step-00000012", "step-00000024", "step-00000028", "step-00000032"]


# SFT


@pytest.fixture
def base(make_recipe):
    recipe = make_recipe("base", steps=2)
    return train(recipe).model


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["illada", "llada"])
def test_sft_begins_with_the_weights_of_a_model(make_recipe, base, rule):
    frozen = make_recipe("frozen", "chat", start=base, steps=1, rule=rule, learning_rate=0.0, final_learning_rate=0.0)
    train(frozen)
    assert same(weights(frozen.output), load_file(base / "model.safetensors"))
    recipe = make_recipe("tuned", "chat", start=base, steps=60, rule=rule, learning_rate=1e-2)
    train(recipe)
    records = read_metrics(Path(recipe.output) / "metrics.jsonl")
    first, last = (sum(r["loss"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.8 * first
    killed = make_recipe("killed", "chat", start=base, steps=60, rule=rule, learning_rate=1e-2)
    train_killed_at(killed, 33)
    assert same(weights(recipe.output), weights(killed.output))


def test_epochs_count_passes_over_the_data(make_recipe, base, data):
    windows = Shards.open(data / "chat").tokens // 32
    recipe = make_recipe("epochs", "chat", start=base, steps=None, epochs=2.5)
    train(recipe)
    assert steps_of(recipe.output)[-1] == round(2.5 * windows / 4)


@pytest.mark.parametrize("how", ["other tokenizer", "other family", "no weights", "cut weights"])
def test_a_start_that_does_not_fit_is_refused(make_recipe, base, tmp_path, how):
    start = tmp_path / "start"
    shutil.copytree(base, start)
    train_on, words = "chat", "start"
    if how == "other tokenizer":
        train_on, words = "other", "prepare it again with --tokenizer"
    elif how == "other family":
        (start / "config.json").write_text(json.dumps({"model_type": "llama"}))
        words = "'llama' model"
    elif how == "no weights":
        (start / "model.safetensors").unlink()
    else:
        (start / "model.safetensors").write_bytes(b"\0" * 100)
    refused(replace(make_recipe("tuned", train_on, start=start)), words)


def test_metrics_survive_a_half_written_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [r["step"] for r in read_metrics(file)] == [1, 2, 3]
    with StepLog(tmp_path, "x", total=5, done=2) as log:
        log.write(3, loss=0.5)
    assert read_metrics(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_weights_change_only_when_the_checkpoint_has_its_copy(make_recipe, monkeypatch):
    """The order of events of a run: a checkpoint is begun, its copy is waited for, the weights change."""
    events = []
    saving, waiting, step = Checkpoints.save, Checkpoints.wait_for_copy, torch.optim.AdamW.step

    def save(self, state):
        events.append("begun")
        path = saving(self, state)
        copied = self._copied
        self._copied = SimpleNamespace(result=lambda: events.append("copied") or copied.result())
        return path

    def wait_for_copy(self):
        waiting(self)
        assert self._copied is None

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(Checkpoints, "wait_for_copy", wait_for_copy)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: events.append("changed") or step(*given))
    recipe = make_recipe(steps=5, checkpoint_every=2)
    train(recipe)
    assert events == [*["changed"] * 2, "begun", "copied", *["changed"] * 2, "begun", "copied", "changed", "begun"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(make_recipe, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("illada.training.checkpoint.CheckpointWriter.write_data", full)
    recipe = make_recipe(steps=4, checkpoint_every=2)
    with pytest.raises(IlladaError, match=r"no checkpoint could be written in .*No space left") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    train(recipe)
    assert steps_of(recipe.output) == [1, 2, 3, 4]
