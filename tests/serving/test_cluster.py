"""Replicas on a real Ray Serve: one test starts Ray, two replicas and a proxy, kills a replica and drains the rest."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest
import torch

from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.serving import cluster
from illada.serving.options import Copies, ServerSettings
from illada.serving.server import open_socket
from illada.weights.options import ModelOptions

pytestmark = pytest.mark.slow

KEY = "a-key-for-tests"
STREAMS = 4
LONG = {"prompt": "one two three", "max_tokens": 1200, "stream": True}
SHORT = {"prompt": "four five", "max_tokens": 16, "seed": 5, "temperature": 1.0}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"replicas": 0}, "replicas is 0"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas is 2"),
        ({"metrics_port": 0}, "metrics_port is 0"),
        ({"metrics_port": 9000, "cluster": "auto"}, "metrics_port is for"),
    ],
)
def test_impossible_numbers_are_refused(values, what):
    with pytest.raises(IlladaError, match=what):
        Copies(**values)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(IlladaError, match=r"pip install 'illada\[cluster\]'"):
        cluster.serve(ModelOptions("model"), ServerSettings(), GenerationSettings(), Copies(2, cluster="auto"))


def test_keys_of_the_environment_do_not_silently_stay_behind(monkeypatch):
    monkeypatch.setenv("ILLADA_API_KEYS", KEY)
    with pytest.raises(IlladaError, match="api_key_file") as refused:
        cluster.serve(ModelOptions("model"), ServerSettings(), GenerationSettings(), Copies(2, cluster="auto"))
    assert KEY not in str(refused.value)


def test_what_needs_no_ray_is_said_before_it_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "_import_ray", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(IlladaError, match="no model at"):
        cluster.serve(ModelOptions(str(tmp_path / "none")), ServerSettings(port=0), GenerationSettings(), Copies(2))
    with open_socket("127.0.0.1", 0) as taken:
        taken.listen()
        settings = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(IlladaError, match="cannot listen"):
            cluster.serve(ModelOptions(str(tmp_path)), settings, GenerationSettings(), Copies(2))


@pytest.fixture
def long_winded(build_model, tiny_tokenizer, tmp_path):
    """Return the folder of a random model that hardly ever ends an answer by itself."""
    ids = {f"{kind}_token_id": getattr(tiny_tokenizer, f"{kind}_token_id") for kind in ("mask", "bos", "eos", "pad")}
    model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer), max_position_embeddings=2048, **ids)
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny_tokenizer.eos_token_id] = 0
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@contextmanager
def started(*words, seconds):
    """Run `illada serve` and give (address, process) when it is ready; end it with all that it started."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "illada", "serve", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = []
    ready = queue.Queue()

    def read():
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready: "):
                ready.put(line.split()[1].rstrip(","))
        ready.put(None)

    threading.Thread(target=read, daemon=True).start()
    family = psutil.Process(process.pid)
    try:
        address = ready.get(timeout=seconds)
        assert address, "".join(lines)
        yield address, process, lines
    finally:
        rest = family.children(recursive=True) if family.is_running() else []
        for each in [*rest, family]:
            if each.is_running():
                each.kill()


def replicas_of(process):
    """Return the processes that hold a replica, by the names that Ray gives them."""
    return [each for each in psutil.Process(process.pid).children(recursive=True) if "ServeReplica" in each.name()]


def text_of(lines, begun=None):
    """Put a stream's text together; the event is set when text begins."""
    text = ""
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["text"]
                if begun is not None and text:
                    begun.set()
        elif line == "data: [DONE]":
            return text
    raise httpx.RemoteProtocolError("the stream ended early")


def metric(text, name):
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def until(look, tries):
    """Call until the result is true; every call goes to the server, which sets the pace."""
    for _ in range(tries):
        if found := look():
            return found
    raise AssertionError("it never came")


@pytest.mark.slow
def test_two_replicas_serve_stream_cancel_survive_and_drain(long_winded, tmp_path):
    pytest.importorskip("ray.serve", reason="replicas need the extra: pip install 'illada[cluster]'")
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    words = (
        f"--model {long_winded} --port 0 --replicas 2 --api_key_file {keys} --log_prompts --drain_timeout 120".split()
    )
    with (
        started(*words, "--block_length", "8", seconds=400) as (address, process, log),
        httpx.Client(base_url=address, headers={"authorization": f"Bearer {KEY}"}, timeout=120) as client,
        ThreadPoolExecutor(STREAMS) as threads,
    ):

        def answer():
            return client.post("/v1/completions", json=SHORT).raise_for_status().json()["choices"][0]["text"]

        def stream(begun):
            with client.stream("POST", "/v1/completions", json=LONG) as response:
                return text_of(response.iter_lines(), begun)

        def begin(count):
            running = []
            for _ in range(count):  # one after the other, so that each goes to the replica that has fewer
                running.append(threads.submit(stream, begun := threading.Event()))
                assert begun.wait(120)
            return running

        def metrics():
            return client.get("/metrics").text

        # Keys reach the replicas, all give the same seeded answer, and a stream says the same as a whole answer.
        assert httpx.post(f"{address}/v1/completions", json=SHORT).status_code == 401
        assert len({answer() for _ in range(6)}) == 1
        with client.stream("POST", "/v1/completions", json={**SHORT, "stream": True}) as response:
            assert text_of(response.iter_lines()) == answer()

        # A replica dies: only what ran on it is lost; other and later requests are answered.
        whole = stream(threading.Event())
        before = {each: sum(each.cpu_times()[:2]) for each in replicas_of(process)}
        assert len(before) == 2
        running = begin(STREAMS)
        victim = max(before, key=lambda each: sum(each.cpu_times()[:2]) - before[each])
        victim.kill()
        short = {answer() for _ in range(4)}
        assert len(short) == 1
        ends = [each.exception() for each in running]
        assert any(ends), "nothing ran on the replica that was killed"
        assert not all(ends), "everything ran on the replica that was killed"
        assert all(isinstance(end, httpx.RemoteProtocolError) for end in ends if end is not None), ends
        assert all(each.result() == whole for each, end in zip(running, ends, strict=True) if end is None)
        # The other replica finished all that it had begun.
        counts = metrics()
        assert metric(counts, 'illada_answers_total{how="cancelled"}') == 0
        assert metric(counts, 'illada_answers_total{how="error"}') == 0

        # Another replica takes its place.
        def replaced():
            metrics()
            now = replicas_of(process)
            return len(now) == 2 and victim not in now

        until(replaced, 20_000)
        assert {answer() for _ in range(4)} == short

        # A client that leaves is noticed behind the proxy.
        with client.stream("POST", "/v1/completions", json=LONG) as response:
            next(response.iter_lines())
        until(lambda: metric(metrics(), 'illada_answers_total{how="cancelled"}') == 1, 1000)

        # Asked to end, it finishes what is under way.
        (last,) = begin(1)
        process.send_signal(signal.SIGTERM)
        assert last.result() == whole
        assert process.wait(120) == 0
        assert KEY not in "".join(log)
        assert any(SHORT["prompt"] in line for line in log)
