"""A Ray cluster that has ended: `prepare --executor ray` says so, instead of waiting for it."""

import socket

import pytest

from illada.errors import IlladaError
from illada.preparation import executors


@pytest.fixture
def closed_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_a_stale_cluster_file_is_named_with_the_remedy(tmp_path, monkeypatch, closed_port):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    executors._check_cluster()  # no cluster at all: one is started
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    for address in (f"127.0.0.1:{closed_port}", "nonsense", "\udcff"):
        file.write_bytes(address.encode("utf-8", "surrogateescape"))
        with pytest.raises(IlladaError, match=r"does not answer .* delete .*ray_current_cluster"):
            executors._check_cluster()


def test_an_address_of_the_user_that_does_not_answer(monkeypatch, closed_port):
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{closed_port}")
    with pytest.raises(IlladaError, match="unset RAY_ADDRESS"):
        executors._check_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    executors._check_cluster()


def test_a_cluster_that_answers_is_used(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        executors._check_cluster()
