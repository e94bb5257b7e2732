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

from illada.errors import IlladaError, needs
from illada.generation.settings import GenerationSettings
from illada.hub import ban_network, quiet_libraries
from illada.serving.about import read_about
from illada.serving.app import create_app
from illada.serving.middleware import read_keys, warn_if_open
from illada.serving.options import Copies, ServerSettings
from illada.serving.server import model_name, open_socket, show_log, url_of
from illada.weights.load import check_shards, load_model
from illada.weights.options import ModelOptions
from illada.weights.runs import model_folder

APPLICATION, DEPLOYMENT = "illada", "model"
BUSY = 16
"""Answers under way in each replica above which another is started (ours: about as many as fit into one pass)."""
HEALTH_SECONDS = 5.0
"""Seconds between two health checks of a replica, which also pass on its metrics."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Replica:
    """What a replica's process holds. Ray Serve creates it, asks it for the application, and checks its health."""

    def __init__(self, model: ModelOptions, name: str, server: ServerSettings, defaults: GenerationSettings) -> None:
        show_log()
        ban_network()
        quiet_libraries()
        network, tokenizer = load_model(model.model, model.dtype, model.device, model.quantize)
        # The application is made here and not in the caller: threads and locks cannot be sent to another process.
        self.application = create_app(network, tokenizer, name, server, defaults, read_about(model.model))
        self.gauges: dict[str, Any] = {}

    def __serve_build_asgi_app__(self) -> Any:
        return self.application

    def check_health(self) -> None:
        """Raise when the replica must be replaced; pass its metrics on to Ray, which names them ray_illada_…

        Ray labels them with the replica, and each machine shows the metrics of all its replicas in one place.
        """
        with needs("cluster", "serving with replicas"):
            from ray.serve.metrics import Gauge

        worker = self.application.state.worker
        if not worker.alive:
            raise RuntimeError("the engine's thread has ended")
        for family in worker.metrics.registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                if sample.name not in self.gauges:
                    # Counters and buckets are gauges too: they are totals already, and Ray's counters take increments.
                    gauge = Gauge(sample.name, family.documentation, tag_keys=tuple(sample.labels))
                    self.gauges[sample.name] = gauge
                self.gauges[sample.name].set(sample.value, tags=sample.labels)


def serve(model: ModelOptions, server: ServerSettings, defaults: GenerationSettings, copies: Copies) -> None:
    """Serve until SIGTERM or SIGINT; answers under way then get `server.drain_timeout` seconds to finish.

    Args:
        model: what to load, and how; a folder lies at the same place on each machine. Unless the device is "cpu", each
            replica gets its own GPU where the cluster has any.
        server: settings of each replica; the proxy before them listens on host and port.
        defaults: how to generate where a request does not say.
        copies: how many replicas, and where.

    Raises:
        IlladaError: when Ray is not installed or not reached, the model, the keys or the address cannot be used, there
            are too few GPUs, or no replica comes up.
    """
    name = server.name or model_name(model.model)
    if server.api_key_file is not None:
        server = replace(server, api_key_file=str(Path(server.api_key_file).resolve()))
    if copies.cluster is None:  # what can be checked without Ray is checked before it starts
        with open_socket(server.host, server.port) as listening:
            server = replace(server, port=listening.getsockname()[1])
        folder = model_folder(model.model)
        if (folder / "config.json").is_file():
            check_shards(folder)
        model = replace(model, model=str(folder.resolve()))
    ray = _import_ray(copies)
    warn_if_open(server, read_keys(server))
    options = _deployment_options(server, copies, _start_ray(ray, copies, model.device))
    deployment = ray.serve.deployment(ray.serve.ingress()(Replica), name=DEPLOYMENT, **options)
    try:
        _run(ray.serve, deployment.bind(model, name, server, defaults), server)
        stop = threading.Event()
        for number in SIGNALS:
            signal.signal(number, lambda *_: stop.set())
        print(f"ready: {url_of(server.host, server.port)}, replicas: {copies.replicas} (Ctrl-C ends)", flush=True)
        stop.wait()
        for number in SIGNALS:  # a second signal ends the process at once
            signal.signal(number, signal.SIG_DFL)
        _drain(ray.serve, server.drain_timeout)
    finally:
        if copies.cluster is not None:  # a cluster of our own ends with Ray
            ray.serve.shutdown()
        ray.shutdown()


def _import_ray(copies: Copies) -> ModuleType:
    """Import Ray, after setting the environment variables that it reads on import."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else Ray leaves repeated lines out of the log
    if copies.cluster is None:
        # Everything that can be bound to the loopback address is. Ray's replicas listen for each other on every address
        # even so: a token made here, and written to no file, keeps others out.
        os.environ.update(
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)
        )
    elif os.environ.get("ILLADA_API_KEYS"):
        raise IlladaError("ILLADA_API_KEYS does not reach the machines of a cluster: put the keys into --api_key_file")
    with needs("cluster", "serving with replicas"):
        import ray
        import ray.serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return ray


def _start_ray(ray: ModuleType, copies: Copies, device: str) -> dict[str, float]:
    """Start or join a Ray cluster; return the CPUs and GPUs that each replica gets."""
    own: dict[str, Any] = {
        "object_store_memory": 100 << 20,  # requests are small and are not kept there
        "include_dashboard": False,
        "_metrics_export_port": copies.metrics_port,
    }
    try:
        # "local" never joins a cluster that happens to run here.
        ray.init(copies.cluster or "local", logging_level=logging.WARNING, **({} if copies.cluster else own))
    except Exception as error:  # Ray's errors have no base class
        where = f"at {copies.cluster} (is RAY_AUTH_MODE=token missing?)" if copies.cluster else "on this machine"
        raise IlladaError(f"Ray cannot be used {where}: {_last_line(str(error))}") from error
    if running := ", ".join(ray.serve.status().applications):
        raise IlladaError(f"Ray Serve already runs {running} at {copies.cluster}: end it, or use a cluster of its own")
    ray.serve.shutdown()  # a Ray Serve that runs nothing may listen elsewhere
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if device == "cpu" or not gpus:
        # Ray lets torch use as many threads. How a cluster's cores are spread over machines is not known.
        return {"num_cpus": 1 if copies.cluster else cores // copies.most or cores * 100 // copies.most / 100}
    if gpus < copies.most:
        raise IlladaError(f"{copies.most} replicas need {copies.most} GPUs and there are {gpus}: start fewer")
    return {"num_cpus": 1, "num_gpus": 1}


def _deployment_options(server: ServerSettings, copies: Copies, resources: dict[str, float]) -> dict[str, Any]:
    """Return how Ray Serve runs the replicas."""
    number: dict[str, Any] = {"num_replicas": copies.replicas}
    if copies.max_replicas is not None:
        limits = {"min_replicas": copies.replicas, "max_replicas": copies.max_replicas}
        number = {"autoscaling_config": {**limits, "target_ongoing_requests": BUSY}}
    return {
        **number,
        "ray_actor_options": resources,
        # The replica itself refuses what is more than max_requests, with 429 and a time to come back; Ray must leave
        # room for these refusals and for /health.
        "max_ongoing_requests": 2 * server.max_requests,
        "max_queued_requests": server.max_requests,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        "max_constructor_retry_count": 1,  # until one replica has come up; from then on Ray never gives up
        "health_check_period_s": HEALTH_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": server.drain_timeout,
    }


def _run(ray_serve: Any, bound: Any, server: ServerSettings) -> None:
    logs = {"log_level": "WARNING", "enable_access_log": False}
    try:
        ray_serve.start(http_options={"host": server.host, "port": server.port}, logging_config=logs)
        ray_serve.run(bound, name=APPLICATION, logging_config=logs)
    except RuntimeError as error:
        application = ray_serve.status().applications.get(APPLICATION)
        deployment = application and application.deployments.get(DEPLOYMENT)
        reason = deployment.message if deployment else str(error)
        raise IlladaError(f"no replica came up: {_last_line(reason)}") from error


def _drain(ray_serve: Any, seconds: float) -> None:
    """Take no new requests, and wait for the replicas to finish and end."""
    deadline = time.monotonic() + seconds + 30
    while time.monotonic() < deadline:
        with suppress(TimeoutError):  # Ray's own limit is one minute
            ray_serve.delete(APPLICATION)
            return


def _last_line(text: str) -> str:
    """Return the message at the end of a traceback, without the error's name."""
    return (text.strip().splitlines() or ["unknown"])[-1].strip().removeprefix("illada.errors.IlladaError: ")
