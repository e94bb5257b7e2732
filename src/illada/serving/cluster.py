"""Many copies of one model behind one address: Ray Serve starts, watches, scales and replaces them (`illada serve
--replicas`). Each replica is a process with its own model and the same application as a server of one process.
"""

import logging
import os
import secrets
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.hub import ban_network
from illada.serving.app import create_app
from illada.serving.middleware import read_keys
from illada.serving.server import model_name, open_socket, show_log
from illada.serving.settings import Copies, ServerSettings
from illada.weights.load import check_shards, load_model
from illada.weights.options import Dtype, Quantization
from illada.weights.runs import model_folder

APPLICATION, DEPLOYMENT = "illada", "model"
BUSY = 16
"""Answers under way in each replica above which another is started (ours: about what one pass still takes along)."""
HEALTH_SECONDS = 5.0
"""Between two looks at each replica, when its figures are passed on too."""


class Replica:
    """What a replica's process holds. Ray Serve makes it, asks it for the application, and looks after its health."""

    def __init__(
        self,
        model: str,
        name: str,
        server: ServerSettings,
        defaults: GenerationSettings,
        dtype: Dtype,
        device: str,
        quantize: Quantization | None,
    ) -> None:
        from transformers.utils import logging as transformers_logging

        show_log()
        ban_network()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        network, tokenizer = load_model(model, dtype, device, quantize)
        # Here and not in the caller: threads and locks cannot be sent to another process.
        self.served = create_app(network, tokenizer, name, server, defaults)
        self.gauges: dict[str, Any] = {}

    def __serve_build_asgi_app__(self) -> Any:
        return self.served

    def check_health(self) -> None:
        """Raise when the replica must be replaced; pass its figures on to Ray's metrics, as ray_illada_…

        Ray's have a label that names the replica, and each machine shows those of all of its replicas in one place.
        """
        from ray.serve.metrics import Gauge

        worker = self.served.state.worker
        if not worker.alive:
            raise RuntimeError("the engine's thread has ended")
        for family in worker.metrics.registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                if sample.name not in self.gauges:
                    # Gauges for counters and buckets too: they are totals already, and Ray's counters take increments.
                    gauge = Gauge(sample.name, family.documentation, tag_keys=tuple(sample.labels))
                    self.gauges[sample.name] = gauge
                self.gauges[sample.name].set(sample.value, tags=sample.labels)


def serve(
    copies: Copies,
    model: str,
    server: ServerSettings,
    defaults: GenerationSettings,
    dtype: Dtype = "auto",
    device: str = "auto",
    quantize: Quantization | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; answers under way then get `server.drain_timeout` seconds to finish.

    Args:
        copies: how many replicas, and where.
        model: model or run folder, the same on each machine, or a hub name.
        server: settings of each replica; host and port are those of the proxy before them.
        defaults: of generation.
        dtype: of the weights.
        device: to run on; unless it is "cpu", each replica gets a GPU for itself where the cluster has any.
        quantize: weights in 8 or 4 bits.

    Raises:
        IlladaError: when Ray is not installed or not reached, the model, the keys or the address cannot be used, there
            are too few GPUs, or no replica comes up.
    """
    name = server.name or model_name(model)
    if server.api_key_file is not None:
        server = replace(server, api_key_file=str(Path(server.api_key_file).resolve()))
    if copies.cluster is None:  # what can be known without Ray is said before it starts
        with open_socket(server.host, server.port) as listening:
            server = replace(server, port=listening.getsockname()[1])
        folder = model_folder(model)
        if (folder / "config.json").is_file():
            check_shards(folder)
        model = str(folder.resolve())
    ray = _ray(copies)
    read_keys(server)
    resources = _start_ray(ray, copies, device)
    served = ray.serve.deployment(
        ray.serve.ingress()(Replica),
        name=DEPLOYMENT,
        ray_actor_options=resources,
        # The replica itself refuses, with 429 and a time to come back, what is more than max_requests; Ray must leave
        # room for that and for /health.
        max_ongoing_requests=2 * server.max_requests,
        max_queued_requests=server.max_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_constructor_retry_count=1,  # until one has come up; from then on Ray never gives up
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=server.drain_timeout,
        **_scale(copies),
    )
    try:
        _run(ray.serve, served.bind(model, name, server, defaults, dtype, device, quantize), server)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        host = f"[{server.host}]" if ":" in server.host else server.host
        print(f"ready: http://{host}:{server.port}, replicas: {copies.replicas} (Ctrl-C ends)", flush=True)
        stop.wait()
        for number in (signal.SIGTERM, signal.SIGINT):  # asked a second time, end at once
            signal.signal(number, signal.SIG_DFL)
        _drain(ray.serve, server.drain_timeout)
    finally:
        if copies.cluster is not None:  # ours ends with Ray
            ray.serve.shutdown()
        ray.shutdown()


def _ray(copies: Copies) -> ModuleType:
    """Import Ray, with its surroundings set before: it reads them then."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else lines like others are left out of the log
    if copies.cluster is None:
        # The loopback address for all that can be bound to it. Ray's replicas listen for each other on every address
        # even so: a key made here, known to no file, keeps others out.
        os.environ.update(
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)
        )
    elif os.environ.get("ILLADA_API_KEYS"):
        raise IlladaError("ILLADA_API_KEYS does not reach the machines of a cluster: put the keys into --api_key_file")
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise IlladaError("replicas need Ray: pip install 'illada[cluster]'") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return ray


def _start_ray(ray: ModuleType, copies: Copies, device: str) -> dict[str, float]:
    """Start or join a Ray cluster; return what each replica gets of it."""
    own: dict[str, Any] = {
        "object_store_memory": 100 << 20,  # requests are small and do not lie there
        "include_dashboard": False,
        "_metrics_export_port": copies.metrics_port,
    }
    try:
        # "local" never joins a cluster that happens to run here.
        ray.init(copies.cluster or "local", logging_level=logging.WARNING, **({} if copies.cluster else own))
    except Exception as error:  # its own errors have no base class
        where = f"at {copies.cluster} (is RAY_AUTH_MODE=token missing?)" if copies.cluster else "on this machine"
        raise IlladaError(f"Ray cannot be used {where}: {_last_line(str(error))}") from error
    if there := ", ".join(ray.serve.status().applications):
        raise IlladaError(f"Ray Serve already runs {there} at {copies.cluster}: end it, or use a cluster of its own")
    ray.serve.shutdown()  # one that runs nothing may listen elsewhere
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if device == "cpu" or not gpus:
        # Ray lets torch take as many threads. How a cluster's cores lie on machines is not known.
        return {"num_cpus": 1 if copies.cluster else cores // copies.most or cores * 100 // copies.most / 100}
    if gpus < copies.most:
        raise IlladaError(f"{copies.most} replicas need {copies.most} GPUs and there are {gpus}: start fewer")
    return {"num_cpus": 1, "num_gpus": 1}


def _scale(copies: Copies) -> dict[str, Any]:
    if copies.max_replicas is None:
        return {"num_replicas": copies.replicas}
    scaling = {
        "min_replicas": copies.replicas,
        "max_replicas": copies.max_replicas,
        "target_ongoing_requests": BUSY,
    }
    return {"autoscaling_config": scaling}


def _run(ray_serve: Any, application: Any, server: ServerSettings) -> None:
    logs = {"log_level": "WARNING", "enable_access_log": False}
    try:
        ray_serve.start(http_options={"host": server.host, "port": server.port}, logging_config=logs)
        ray_serve.run(application, name=APPLICATION, logging_config=logs)
    except RuntimeError as error:
        found = ray_serve.status().applications.get(APPLICATION)
        why = found.deployments[DEPLOYMENT].message if found and DEPLOYMENT in found.deployments else str(error)
        raise IlladaError(f"no replica came up: {_last_line(why)}") from error


def _drain(ray_serve: Any, seconds: float) -> None:
    """Take no new requests, and wait for the replicas to finish and end."""
    deadline = time.monotonic() + seconds + 30
    while time.monotonic() < deadline:
        with suppress(TimeoutError):  # Ray's own limit is one minute
            ray_serve.delete(APPLICATION)
            return


def _last_line(text: str) -> str:
    """Return what a traceback ends with, without the error's name."""
    return (text.strip().splitlines() or ["unknown"])[-1].strip().removeprefix("illada.errors.IlladaError: ")
