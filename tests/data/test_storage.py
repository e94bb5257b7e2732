import json
from collections import Counter
from fractions import Fraction

import fsspec
import numpy as np
import pytest

from illada.cli import main
from illada.data import storage
from illada.data.batches import Batches, read_segments
from illada.data.shards import Shards
from illada.errors import IlladaError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "illada"


@pytest.fixture
def memory(make_data, tiny_tokenizer, tmp_path, cache):
    """A data set in a folder, and a copy of it at memory://data."""
    documents = [([n % 60] * (n % 11 + 2), n % 3) for n in range(50)]
    local = make_data(tmp_path / "data", documents, tiny_tokenizer, kind="chat", per_shard=40)
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path / "data"), "/data", recursive=True)
    yield local, files
    files.rm("/data", recursive=True)


def count_reads(monkeypatch, files):
    reads = Counter()
    original = type(files).cat_file

    def cat_file(self, path, start=None, end=None, **options):
        reads[path.rsplit("/", 1)[-1].partition(".")[2] or path.rsplit("/", 1)[-1]] += 1
        return original(self, path, start, end, **options)

    monkeypatch.setattr(type(files), "cat_file", cat_file)
    return reads


def test_what_is_streamed_is_what_lies_in_the_folder(memory, cache, monkeypatch):
    local, files = memory
    reads = count_reads(monkeypatch, files)
    remote = Shards.open("memory://data")
    assert "tokens" not in reads
    assert "documents" not in reads
    assert remote.read(0, remote.tokens).tolist() == local.read(0, local.tokens).tolist()
    assert remote.read_all([(5, 60), (0, 3), (90, 0)]).tolist() == [*local.read(5, 60), *local.read(0, 3)]
    for rule in ("illada", "llada"):
        plan = Batches(remote, 16, 4, seed=1, rule=rule, eos_token_id=2).plan(3)
        assert plan == Batches(local, 16, 4, seed=1, rule=rule, eos_token_id=2).plan(3)
        segments = [segment for sample in plan for segment in sample]
        assert read_segments(segments, remote, 2).tolist() == read_segments(segments, local, 2).tolist()
    assert 0 < reads["documents"] == len(list(remote.path.glob("*.documents")))
    assert {file.name for file in (remote.path / "tokenizer").iterdir()} == {
        file.name for file in (local.path / "tokenizer").iterdir()
    }
    assert remote.path.parent == cache
    assert not list(cache.rglob("*.tokens")) + list(cache.rglob("*.partial"))
    # The second time the small files are at hand.
    before = reads["documents"]
    Batches(Shards.open("memory://data"), 16, 4, seed=1, rule="llada", eos_token_id=2).plan(3)
    assert reads["documents"] == before


@pytest.mark.parametrize("file", ["shard-00000.documents", "tokenizer/tokenizer_config.json"])
def test_a_small_file_that_is_damaged_over_there_is_not_used(memory, file):
    content = memory[1].cat_file(f"/data/{file}")
    memory[1].pipe_file(f"/data/{file}", content[:3] + bytes([content[3] ^ 1]) + content[4:])
    with pytest.raises(IlladaError, match=f"memory://data/{file} is damaged: copy"):
        Shards.open("memory://data").document_span(0)


def test_tokens_of_a_batch_are_asked_for_at_once(memory, monkeypatch):
    remote = Shards.open("memory://data")
    calls = []
    original = type(memory[1]).cat_ranges
    monkeypatch.setattr(
        type(memory[1]),
        "cat_ranges",
        lambda self, paths, *a, **k: calls.append(len(paths)) or original(self, paths, *a, **k),
    )
    remote.read_all([(0, 10), (30, 10), (100, 10)])
    assert len(calls) == 1


def test_data_prepared_anew_is_not_taken_from_the_cache(memory, make_data, tiny_tokenizer, tmp_path):
    first = Shards.open("memory://data")
    assert first.document_span(0)[1] == 2
    make_data(tmp_path / "other", [[5] * 7, [6] * 3], tiny_tokenizer)
    memory[1].rm("/data", recursive=True)
    memory[1].put(str(tmp_path / "other"), "/data", recursive=True)
    assert Shards.open("memory://data").document_span(0)[1] == 7


def test_what_cannot_be_reached_is_one_clear_line(memory, monkeypatch):
    with pytest.raises(IlladaError, match="no prepared data at memory://nowhere"):
        Shards.open("memory://nowhere")
    with pytest.raises(IlladaError, match="abacus://x: nothing is known that reads abacus://"):
        Shards.open("abacus://x")
    with pytest.raises(IlladaError, match="reading s3:// needs s3fs: pip install s3fs"):
        Shards.open("s3://bucket/data")
    remote = Shards.open("memory://data")

    def broken(*_, **__):
        raise ConnectionError("the line is dead\nvery")

    monkeypatch.setattr(type(memory[1]), "cat_ranges", broken)
    with pytest.raises(IlladaError, match=r"cannot read memory://data: the line is dead$"):
        remote.read(0, 5)
    memory[1].rm("/data/shard-00000.tokens")
    with pytest.raises(IlladaError, match=r"memory://data/shard-00000\.tokens is missing"):
        Shards.open("memory://data")


def test_maps_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN_MAPS", 2)
    for n in range(4):
        np.arange(n + 1).astype("<u2").tofile(tmp_path / f"{n}.tokens")
    folder = storage.Folder(tmp_path)
    for n in (0, 1, 2, 3, 0):
        assert folder.whole(f"{n}.tokens", np.dtype("<u2")).tolist() == list(range(n + 1))
        assert len(folder._maps) <= 2


@pytest.fixture
def mixed(make_data, tmp_path):
    """Three data sets of 21, 40 and 10 windows of 10, told apart by their tokens."""
    parts = {}
    for name, windows, token in (("web", 20, 7), ("books", 40, 8), ("code", 10, 9)):
        make_data(tmp_path / name, [[token] * 15] * (windows * 10 // 15 + 1), per_shard=60)
        parts[name] = str(tmp_path / name)
    return parts


def test_a_mixture_keeps_its_shares(mixed):
    weights = {mixed["web"]: 0.5, mixed["books"]: 0.3, mixed["code"]: 0.2}
    shards = Shards.open(weights)
    assert [source.share for source in shards.sources] == [Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)]
    batches = Batches(shards, window=10, samples_per_step=32, seed=4, split_probability=0.0)
    assert batches.samples == 21 + 40 + 10
    seen: dict[int, list[tuple[int, int]]] = {7: [], 8: [], 9: []}
    for step in range(40):
        plan = batches.plan(step)
        ids = read_segments([segments[0] for segments in plan], shards).reshape(-1, 10)
        assert (ids == ids[:, :1]).all()
        for row, (segment,) in zip(ids, plan, strict=True):
            seen[int(row[0])].append((segment.epoch, segment.sample))
    # 1280 samples are 20 rounds of 64.
    assert [len(found) for found in seen.values()] == [640, 384, 256]
    for found, windows in zip(seen.values(), (21, 40, 10), strict=True):
        # Every epoch but the last has each window once, and no other begins before (by more than a round).
        assert len(set(found)) == len(found)
        epochs = Counter(epoch for epoch, _ in found)
        assert [epochs[epoch] for epoch in range(len(epochs) - 1)] == [windows] * (len(epochs) - 1)
        order = [epoch for epoch, _ in found]
        assert all(abs(place // windows - epoch) <= 64 // windows + 1 for place, epoch in enumerate(order))
    assert len({sample for found in seen.values() for _, sample in found}) == 71


def test_a_mixture_of_chats_and_its_documents(make_data, tmp_path):
    first = [([n] * (n + 2), 1) for n in range(8)]
    second = [([n] * (n + 3), 2) for n in range(20, 30)]
    for name, documents in (("a", first), ("b", second)):
        make_data(tmp_path / name, documents, kind="chat", per_shard=20)
    shards = Shards.open({str(tmp_path / "a"): 1, str(tmp_path / "b"): 3})
    assert shards.kind == "chat"
    for i, (ids, prompt) in enumerate(first + second):
        start, end, found = shards.document_span(i)
        assert (shards.read(start, end - start).tolist(), found) == (ids, prompt)
    batches = Batches(shards, 100, 16, seed=0, rule="llada", eos_token_id=2)
    drawn = [segments[0].sample for step in range(8) for segments in batches.plan(step)]
    assert sum(sample >= 8 for sample in drawn) == 96
    assert set(drawn) == set(range(18))


def test_a_mixture_that_cannot_be_is_refused(mixed, make_data, tmp_path):
    with pytest.raises(IlladaError, match=r"weight of .*web is 0: it must be above 0"):
        Shards.open({mixed["web"]: 0})
    with pytest.raises(IlladaError, match="is empty"):
        Shards.open({})
    make_data(tmp_path / "other", [[1] * 30], vocab_size=70)
    with pytest.raises(IlladaError, match=r"other was prepared with another tokenizer than .*web"):
        Shards.open({mixed["web"]: 1, str(tmp_path / "other"): 1})
    with pytest.raises(IlladaError, match="code holds 105 tokens, less than one window of 200"):
        Batches(Shards.open({mixed["books"]: 1, mixed["code"]: 1}), 200, 1, seed=0)


def test_a_recipe_may_name_a_mixture(mixed, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {preset: 1m, num_hidden_layers: 1}\n"
        f"data: {{window: 10, train: {{{mixed['web']}: 0.5, {mixed['books']}: 0.5}}}}\n"
        "training: {epochs: 1, samples_per_step: 5}\n"
    )
    main(["estimate", str(recipe), "--gpu", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["vocab_size"], found["steps"]) == (64, round((21 + 40) / 5))
