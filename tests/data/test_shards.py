import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illada.data import storage as module
from illada.data.shards import ShardInfo, Shards
from illada.errors import IlladaError
from illada.preparation.shard_writer import ShardWriter, write_index


def make(folder: Path, documents: list[tuple[list[int], int]], vocab_size: int = 300, per_shard: int = 10) -> Shards:
    writer = ShardWriter(folder, vocab_size, tokens_per_shard=per_shard)
    for ids, prompt in documents:
        writer.append(ids, prompt, source_bytes=len(ids) * 3)
    write_index(folder, writer.finish(), vocab_size=vocab_size, tokenizer_sha256="ab", kind="chat")
    return Shards.open(folder)


documents_strategy = st.lists(
    st.lists(st.integers(0, 299), min_size=1, max_size=12).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids)))
    ),
    max_size=15,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=20, derandomize=True)
@given(documents_strategy, st.integers(1, 25), st.sampled_from([300, 70_000]), st.integers(1, 3))
def test_what_is_written_is_what_is_read(tmp_path_factory, documents, per_shard, vocab_size, maps):
    folder = tmp_path_factory.mktemp("shards")
    module._OPEN_MAPS, held = maps, module._OPEN_MAPS
    try:
        shards = make(folder, documents, vocab_size, per_shard)
        stream = [i for ids, _ in documents for i in ids]
        ends = np.cumsum([len(ids) for ids, _ in documents]).tolist()
        assert (shards.tokens, shards.documents, shards.bytes) == (len(stream), len(documents), 3 * len(stream))
        assert shards.index["dtype"] == ("uint16" if vocab_size == 300 else "uint32")
        for start in range(0, len(stream) + 1, 3):
            for end in range(start, len(stream) + 1, 4):
                read = shards.read(start, end - start)
                assert read.dtype == np.int64
                assert read.tolist() == stream[start:end]
                assert shards.document_ends_within(start, end) == [e for e in ends if start < e < end]
        for i, (ids, prompt) in enumerate(documents):
            assert shards.document_span(i) == (ends[i] - len(ids), ends[i], prompt)
        again = pickle.loads(pickle.dumps(shards))
        assert again.read(0, len(stream)).tolist() == stream
        assert all(len(store._maps) <= maps for store in shards._stores)
    finally:
        module._OPEN_MAPS = held


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 5), (3, -1), (5, 0)])
def test_reading_outside_the_stream_is_an_error(tmp_path, start, count):
    with pytest.raises(IndexError):
        make(tmp_path, [([1, 2, 3, 4], 0)]).read(start, count)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(IlladaError, match="token id 300 is outside the vocabulary of 300"):
        ShardWriter(tmp_path, 300).append([1, 300])
    with pytest.raises(IlladaError, match="token id -1"):
        ShardWriter(tmp_path, 300).append([-1])


def test_a_document_in_pieces_is_one_document_and_stays_in_one_shard(tmp_path):
    writer = ShardWriter(tmp_path, 300, tokens_per_shard=4)
    for piece in ([1, 2, 3], [], [4, 5, 6], np.array([7])):
        writer.extend(piece)
    writer.end_document(prompt_tokens=2, source_bytes=9)
    assert not (tmp_path / "shard-00000.tokens.partial").exists()
    writer.append([8])
    assert writer.finish() == [ShardInfo("shard-00000", 7, 1, 9), ShardInfo("shard-00001", 1, 1, 0)]
    assert np.fromfile(tmp_path / "shard-00000.tokens", "<u2").tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert np.fromfile(tmp_path / "shard-00000.documents", "<i8").tolist() == [7, 2]


def test_an_unfinished_shard_has_no_final_name(tmp_path):
    writer = ShardWriter(tmp_path, 300)
    writer.append([1, 2])
    assert [file.name for file in tmp_path.iterdir()] == ["shard-00000.tokens.partial"]
    writer.finish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["shard-00000.documents", "shard-00000.tokens"]


def _edit_index(folder: Path, **change: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))


def _set_ends(folder: Path, rows: list[int]) -> None:
    np.asarray(rows, "<i8").tofile(folder / "shard-00000.documents")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "index.json").unlink(), "has no index.json"),
        (lambda f: (f / "index.json").write_text("{"), "is damaged"),
        (lambda f: (f / "index.json").write_text("[]"), "no format_version"),
        (lambda f: (f / "index.json").write_text('{"format_version": 1}'), "is damaged"),
        (lambda f: _edit_index(f, format_version=99), "use a newer illada"),
        (lambda f: _edit_index(f, tokens=6), "tokens is 6 but its shards hold 5"),
        (lambda f: (f / "shard-00000.tokens").unlink(), "shard-00000.tokens is missing"),
        (lambda f: (f / "shard-00000.documents").unlink(), "shard-00000.documents is missing"),
        (lambda f: (f / "shard-00000.tokens").write_bytes(b"\0" * 8), "has 8 bytes instead of 10"),
        (lambda f: _set_ends(f, [3, 0, 4, 0]), "shard-00000.documents is damaged"),
        (lambda f: _set_ends(f, [5, 0, 5, 0]), "shard-00000.documents is damaged"),
        (lambda f: _set_ends(f, [3, 4, 5, 0]), "shard-00000.documents is damaged"),
    ],
)
def test_damage_is_one_clear_line(tmp_path, damage, message):
    make(tmp_path, [([1, 2, 3], 0), ([4, 5], 1)])
    damage(tmp_path)
    with pytest.raises(IlladaError, match=message) as caught:
        Shards.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_one_clear_line(tmp_path):
    with pytest.raises(IlladaError, match="illada prepare"):
        Shards.open(tmp_path / "nowhere")


def test_a_mixture_of_one_is_still_a_mixture(tmp_path):
    """Runs remember the fingerprints of a mixture as a list."""
    writer = ShardWriter(tmp_path, 300)
    writer.append([1, 2, 3])
    write_index(tmp_path, writer.finish(), vocab_size=300, provenance={"source_fingerprint": "x"})
    assert Shards.open(tmp_path).index["provenance"] == {"source_fingerprint": "x"}
    assert Shards.open({str(tmp_path): 3.0}).index == {"provenance": {"source_fingerprint": ["x"]}}
