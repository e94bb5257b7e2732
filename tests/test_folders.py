import os

import pytest
import xxhash

from illada import folders
from illada.errors import DamagedError, IlladaError
from illada.files import read_text, write_bytes
from illada.folders import SUMS, checksum, damage, new_folder, read_sums, seal


@pytest.fixture
def sealed(tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "a.bin").write_bytes(bytes(range(256)) * 9000)
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "b c.txt").write_text("b")
        (folder / "empty").write_bytes(b"")
    return tmp_path / "made"


def test_every_file_of_a_new_folder_has_its_checksum(sealed):
    sums = read_sums(sealed)
    assert sums.keys() == {"a.bin", "deep/er/b c.txt", "empty"}
    for name, digest in sums.items():
        assert digest == checksum(sealed / name) == xxhash.xxh3_128((sealed / name).read_bytes()).hexdigest()
    assert damage(sealed) == []


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda f: flip(f / "a.bin", 1_500_000), "a.bin is damaged: its checksum"),
        (lambda f: zeros(f / "a.bin", 8192), "a.bin is damaged"),
        (lambda f: (f / "a.bin").write_bytes((f / "a.bin").read_bytes()[:-1]), "a.bin is damaged"),
        (lambda f: (f / "empty").write_bytes(b"\0"), "empty is damaged"),
        (lambda f: (f / "deep/er/b c.txt").unlink(), "b c.txt is missing"),
        (lambda f: (f / SUMS).write_bytes(b"\xff\xfe"), f"{SUMS} is not UTF-8 text"),
        (lambda f: (f / SUMS).write_text(""), f"{SUMS} is damaged: it is empty"),
        (lambda f: (f / SUMS).write_text(f"{'0' * 32}  ../../x\n"), "is no checksum of a file in the folder"),
        (lambda f: (f / SUMS).write_text(f"{'0' * 32}  /dev/zero\n"), "is no checksum of a file in the folder"),
        (lambda f: (f / SUMS).write_text("0000  a.bin\n"), "is no checksum of a file in the folder"),
    ],
)
def test_damage_is_named(sealed, how, says):
    how(sealed)
    (line,) = damage(sealed)
    assert says in line
    assert "\n" not in line


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def zeros(path, place):
    content = path.read_bytes()
    path.write_bytes(content[:place] + bytes(4096) + content[place + 4096 :])


def test_shares_of_a_check_make_the_whole(sealed):
    for name in read_sums(sealed):
        (sealed / name).unlink()
    parts = [damage(sealed, share=(number, 2)) for number in range(2)]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == sorted(damage(sealed))
    assert damage(sealed, lambda name: name == "empty") == [f"{sealed / 'empty'} is missing"]


def test_a_folder_without_checksums_is_not_judged(tmp_path):
    (tmp_path / "x").write_text("x")
    assert damage(tmp_path) == []


def test_the_disk_has_everything_before_a_folder_can_be_seen(tmp_path, monkeypatch):
    """At the rename every file and folder inside has been synced, and afterwards the folder that holds the name."""
    synced, fsync, seen = [], os.fsync, []
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    rename = folders.Path.rename
    monkeypatch.setattr(folders.Path, "rename", lambda *given: (seen.extend(synced), rename(*given))[1])
    with new_folder(tmp_path / "up" / "made") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("a")
    inside = ("", "/deep", "/deep/a", f"/{SUMS}.partial")
    assert {f"{tmp_path}/up/.made.partial{name}" for name in inside} <= set(seen)
    assert {f"{tmp_path}/up", f"{tmp_path}"} <= set(synced[len(seen) :])


def test_known_checksums_are_not_computed_again(tmp_path, monkeypatch):
    (tmp_path / "large").write_text("large")
    (tmp_path / "small").write_text("small")
    read = []
    monkeypatch.setattr(folders, "checksum", lambda path: (read.append(path.name), "0" * 32)[1])
    seal(tmp_path, {"large": "f" * 32}, lambda name: name != "stranger")
    assert read == ["small"]
    assert read_sums(tmp_path) == {"large": "f" * 32, "small": "0" * 32}


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Exception("No space left on device (os error 28)")])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, error):
    def fill():
        with new_folder(tmp_path / "a" / "b") as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(IlladaError, match=r"no room for .*: the disk is full: free some"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_fit_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_bytes(tmp_path / "x", b"new")
    assert caught.value.filename == str(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_bytes_that_are_not_text_are_one_line(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(IlladaError, match="x is not UTF-8 text"):
        read_text(tmp_path / "x")


def test_the_program_xxhsum_would_read_the_file(sealed):
    """Its format is one of coreutils: digits, two blanks, the name."""
    line = (sealed / SUMS).read_text().splitlines()[0]
    assert line == f"{xxhash.xxh128_hexdigest((sealed / 'a.bin').read_bytes())}  a.bin"


def test_a_folder_moved_into_another_gets_its_checksums_last(sealed, monkeypatch):
    moved, replace = [], folders.Path.replace
    monkeypatch.setattr(folders.Path, "replace", lambda path, to: (moved.append(path.name), replace(path, to))[1])
    with new_folder(sealed, into_existing=True) as folder:
        (folder / "z").write_text("z")
        (folder / "a.bin").write_text("new")
    assert moved == ["a.bin", "z", SUMS]
    assert damage(sealed) == []
    (sealed / SUMS).write_text("x")
    with pytest.raises(DamagedError):
        read_sums(sealed)
