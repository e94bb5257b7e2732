import json
import stat
from pathlib import Path

import pytest

from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.preparation import executors
from illada.preparation import prepare as preparing
from illada.preparation.filters import PlainWords
from illada.preparation.options import PrepareSettings
from illada.text.tokenizer import load_tokenizer

GOOD = (
    "The harbour was quiet that morning, and the boats lay still. Nobody had come to the pier yet.\n"
    "A gull walked along the wall with an air of importance. It stopped, looked at the water and went on.\n"
    "Later the fishermen would be here to mend their nets, as they did every day of the year.\n"
    "They would talk of the weather and of the price of diesel. Then they would fall silent again.\n"
    "It was said that the old lighthouse had a keeper still, but no one had seen him since the winter.\n"
)
OTHER = GOOD.replace("gull", "heron").replace("fishermen", "sailors").replace("keeper", "ghost")


def prepare(*arguments, **settings):
    return preparing.prepare(PrepareSettings(*arguments, **settings))


@pytest.fixture
def tokens(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write(folder: Path, *documents: str) -> str:
    folder.mkdir()
    for n, text in enumerate(documents):
        (folder / f"{n}.txt").write_text(text)
    return str(folder)


def texts(shards: Shards) -> list[str]:
    tokenizer = load_tokenizer(shards.path / "tokenizer")
    spans = (shards.document_span(i) for i in range(shards.documents))
    return [tokenizer.decode(shards.read(start, end - start).tolist()[1:-1]) for start, end, _ in spans]


def content(folder: Path) -> dict[str, bytes]:
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.*s") if f.is_file()}
    index = json.loads((folder / "index.json").read_text())
    del index["provenance"]["date"]
    return files | {"index": json.dumps(index).encode()}


@pytest.mark.parametrize("task_bytes", [1, 10_000_000])
def test_of_equal_documents_the_first_stays(tmp_path, tokens, task_bytes, capfd):
    documents = [GOOD, "short", OTHER, GOOD, "short", GOOD + "more"]
    shards = prepare(
        [write(tmp_path / "in", *documents)], str(tmp_path / "out"), tokens, task_bytes=task_bytes, dedup="exact"
    )
    assert texts(shards) == [GOOD, "short", OTHER, GOOD + "more"]
    assert shards.index["odd"]["duplicate_documents"] == 2
    assert not (tmp_path / "out" / "work").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("task_bytes", [1, 10_000_000])
def test_of_similar_documents_one_stays(tmp_path, tokens, task_bytes):
    similar = GOOD.replace("diesel", "petrol")
    words = " ".join(f"w{n}" for n in range(200))
    documents = [GOOD, "too short", words, similar, "too short", GOOD]
    shards = prepare(
        [write(tmp_path / "in", *documents)], str(tmp_path / "out"), tokens, task_bytes=task_bytes, dedup="minhash"
    )
    kept = texts(shards)
    # Fewer than five words have no five-grams to compare.
    assert [text for text in kept if text not in (GOOD, similar)] == ["too short", words, "too short"]
    assert len(kept) == 4
    assert shards.index["odd"]["duplicate_documents"] == 2


def test_filters_drop_poor_text_and_say_how_much(tmp_path, tokens):
    poor = "# # # # buy now # # # # " * 20
    documents = [GOOD * 3, poor, "word " * 60, OTHER * 3 + "a { brace on a line of its own.\n"]
    source = write(tmp_path / "in", *documents)
    shards = prepare([source], str(tmp_path / "out"), tokens, filters=["gopher,c4"])
    assert texts(shards) == [(GOOD * 3).strip()]
    dropped = {name: shards.index["odd"][f"{name}_documents"] for name in ("gopher", "c4")}
    assert dropped == {"gopher": 2, "c4": 1}
    assert shards.index["provenance"]["filters"] == ["gopher", "c4"]
    assert prepare([source], str(tmp_path / "both"), tokens, filters=["gopher"], dedup="exact").documents == 2


def test_a_document_longer_than_a_piece_is_judged_as_one(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr("illada.preparation.readers.PIECE_CHARACTERS", 100)
    source = write(tmp_path / "in", GOOD, GOOD, GOOD + OTHER)
    assert texts(prepare([source], str(tmp_path / "out"), tokens, dedup="exact")) == [GOOD, GOOD + OTHER]


def test_conversations_can_be_deduplicated_but_not_filtered(tmp_path, tokens):
    record = {"prompt": "one two", "response": "three"}
    lines = [record, record, {"prompt": "one two", "response": "four"}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ([str(tmp_path / "chat.jsonl")], str(tmp_path / "out"), tokens, "chat")
    with pytest.raises(IlladaError, match="filters are for texts"):
        prepare(*arguments, filters=["gopher"])
    assert prepare(*arguments, dedup="exact").documents == 2


@pytest.mark.parametrize("dedup", ["exact", "minhash"])
@pytest.mark.parametrize("task_bytes", [300, 10_000_000])
def test_of_equal_pairs_the_first_stays_whole(tmp_path, tokens, dedup, task_bytes):
    long = " ".join(f"w{n}" for n in range(50))
    pair = {"prompt": long, "chosen": "one two three", "rejected": "four"}
    other = {"prompt": "some", "chosen": "seven", "rejected": "four"}
    lines = [pair, other, pair, {**other, "chosen": "four", "rejected": "seven"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = prepare([str(tmp_path / "pairs.jsonl")], str(tmp_path / "out"), tokens, dedup=dedup, task_bytes=task_bytes)
    tokenizer, said = load_tokenizer(tokens), []
    for i in range(shards.documents):
        start, end, prompt = shards.document_span(i)
        said.append(tokenizer.decode(shards.read(start + prompt, end - start - prompt - 1).tolist()))
    first, *swapped = [("one two three", "four"), ("seven", "four"), ("four", "seven")]
    answers = list(zip(said[::2], said[1::2], strict=True))
    assert sorted(answers) == sorted([first, *swapped])
    assert shards.index["odd"]["duplicate_documents"] == 1


def test_what_was_prepared_otherwise_is_refused(tmp_path, tokens):
    source = write(tmp_path / "in", GOOD)
    prepare([source], str(tmp_path / "out"), tokens)
    with pytest.raises(IlladaError, match="dedup was none, now exact"):
        prepare([source], str(tmp_path / "out"), tokens, dedup="exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": ["goofy"]}, "no filter 'goofy': choose from gopher, gopher-repetition, c4, fineweb"),
        ({"filters": ["language"]}, "no filter language: it needs a fastText model"),
        ({"dedup": "fuzzy"}, "dedup is none, exact or minhash"),
        ({"executor": "Ray"}, "executor is local, ray or slurm, not 'Ray'"),
        ({"executor": "slurm"}, "needs a partition"),
        ({"partition": "cpu"}, "are for executor slurm"),
        ({"memory_gb": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_one_clear_line(tmp_path, tokens, arguments, message):
    with pytest.raises(IlladaError, match=message):
        prepare([write(tmp_path / "in", GOOD)], str(tmp_path / "out"), tokens, **arguments)
    assert not (tmp_path / "out" / "index.json").exists()


def test_plain_words():
    words = PlainWords()
    assert words.word_tokenize("It's 3.5 naïve 世界!") == ["It", "'", "s", "3", ".", "5", "naïve", "世界", "!"]
    text = "One. Two? 3.5 is three!  Four"
    assert words.sent_tokenize(text) == ["One.", "Two?", "3.5 is three!", "Four"]
    assert "".join(text[start:end] for start, end in words.span_tokenize(text)) == text


@pytest.mark.slow
def test_a_two_worker_ray_run_makes_the_same_data(tmp_path, tokens):
    pytest.importorskip("ray")
    source = write(tmp_path / "in", GOOD, OTHER)
    local = prepare([source], str(tmp_path / "local"), tokens, task_bytes=1)
    try:
        ray = prepare([source], str(tmp_path / "ray"), tokens, task_bytes=1, executor="ray", workers=2, memory_gb=1)
    except IlladaError as error:
        if "Ray cannot be used here" not in str(error):
            raise
        pytest.skip(str(error))  # it gives up after half a minute on a busy machine
    assert ray.documents == local.documents == 2
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_a_failed_ray_task_says_why(tmp_path):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "task_00003.log"
    log.write_text("Traceback\n  File\nillada.errors.IlladaError: cannot read a.txt: gone\n")
    assert executors._failure(tmp_path, 3) == "cannot read a.txt: gone"
    log.write_text("Traceback\nMemoryError: \nValueError: odd\n")
    assert executors._failure(tmp_path, 3).startswith("task 3 failed (ValueError: odd): see ")
    assert "did not finish" in executors._failure(tmp_path, 4)


SBATCH = """#!/bin/bash
# Runs what it is given, at once, as a cluster would some day.
script="${@: -1}"
echo "$*" >> "$SLURM_LOG"
grep -q merge_stats "$script" && { echo "Submitted batch job 99"; exit; }
cp "$script" "$SLURM_LOG.script"
last=$(sed -n 's/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "$script" >> "$SLURM_LOG.out" 2>&1 || exit 1
done
echo "Submitted batch job 7"
"""


@pytest.mark.slow
def test_slurm_jobs_make_the_data(tmp_path, tokens, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }.items():
        (programs / name).write_text(script)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("SLURM_LOG", str(tmp_path / "slurm"))
    source = write(tmp_path / "in", GOOD, "short")
    arguments = {"executor": "slurm", "partition": "cpu", "slurm_options": ["account=me"], "workers": 4}
    job = prepare([source], str(tmp_path / "out"), tokens, **arguments)
    assert job == "7", (tmp_path / "slurm.out").read_text()
    assert texts(Shards.open(tmp_path / "out")) == [GOOD, "short"]
    script = (tmp_path / "slurm.script").read_text()
    for line in ("--partition=cpu", "--account=me", "--time=24:00:00", "--mem-per-cpu=2G"):
        assert f"#SBATCH {line}" in script
    assert "qos" not in script
    jobs = (tmp_path / "slurm").read_text().splitlines()
    assert "afterok:7" in next(line for line in jobs[1:] if "dependency=" in line)
    # Done: the same call gives the data.
    assert isinstance(prepare([source], str(tmp_path / "out"), tokens, **arguments), Shards)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(IlladaError, match="there is no sbatch here"):
        prepare([source], str(tmp_path / "again"), tokens, **arguments)
