"""How to serve: limits, keys, addresses and replicas, as the command line takes them. Imports no torch."""

from dataclasses import dataclass

from illada.errors import IlladaError


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server (all ours).

    Args:
        host: address to listen on; 127.0.0.1 is reachable from this machine only.
        port: port to listen on; 0 takes a free one.
        name: name of the model in the API; null takes the name of its folder.
        alias: more names under which requests may ask for the model.
        api_key_file: file with an API key on each line; null takes the keys from the environment variable
            ILLADA_API_KEYS, separated by commas. Without keys everyone who reaches the address may ask.
        cors_origins: web origins whose pages may ask, such as https://example.org; none by default.
        allowed_hosts: names by which requests may call this server. By default any name will do, but on a loopback
            address only the loopback names, so that other sites' pages cannot reach it under a name of theirs (DNS
            rebinding).
        max_connections: most connections; beyond it those are closed that are slow to send a request, the oldest first.
        max_requests: most answers under way and waiting; more are refused with 429.
        max_choices: most answers to one prompt (`n`).
        max_body_bytes: size of the largest request.
        max_batch_tokens: most positions of one forward pass.
        max_past_tokens: most positions whose keys and values are kept.
        request_timeout: seconds within which an answer must be finished, including the time it waits.
        drain_timeout: seconds that answers under way get when the server is asked to end.
        log_prompts: write prompts and answers to the log.

    Raises:
        IlladaError: when a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    alias: tuple[str, ...] = ()
    api_key_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_connections: int = 512
    max_requests: int = 256
    max_choices: int = 8
    max_body_bytes: int = 1_000_000
    max_batch_tokens: int = 2048
    max_past_tokens: int = 2**16
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        """Check every value and turn lists into tuples."""
        for name in ("alias", "cors_origins", "allowed_hosts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.host.strip():
            raise IlladaError("host is empty, which would mean every interface: give 127.0.0.1, or 0.0.0.0 to mean it")
        if not 0 <= self.port < 2**16:
            raise IlladaError(f"port is {self.port}: it must be between 0 and 65535")
        for name in (
            "max_connections",
            "max_requests",
            "max_choices",
            "max_body_bytes",
            "max_batch_tokens",
            "max_past_tokens",
        ):
            if getattr(self, name) < 1:
                raise IlladaError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("request_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise IlladaError(f"{name} is {getattr(self, name):g}: it must be a number of seconds above 0")
        if self.max_choices > self.max_requests:
            raise IlladaError("max_choices is larger than max_requests: raise max_requests")


@dataclass(frozen=True)
class Copies:
    """How many replicas, and where (all ours).

    Args:
        replicas: copies of the model, each in its own process and, where there are GPUs, on its own GPU.
        max_replicas: most copies when many answers are under way; null keeps the number at `replicas`.
        cluster: address of a Ray cluster ("auto" for one that runs on this machine); null starts one that only this
            machine can reach.
        metrics_port: port where this machine's Ray gives Prometheus the metrics of all replicas; null takes a free one.

    Raises:
        IlladaError: when a number is out of range.
    """

    replicas: int = 1
    max_replicas: int | None = None
    cluster: str | None = None
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if self.replicas < 1:
            raise IlladaError(f"replicas is {self.replicas}: it must be at least 1")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise IlladaError(f"max_replicas is {self.max_replicas}: it must be at least replicas, {self.replicas}")
        if self.metrics_port is not None and not 0 < self.metrics_port < 2**16:
            raise IlladaError(f"metrics_port is {self.metrics_port}: it must be between 1 and 65535")
        if self.metrics_port is not None and self.cluster is not None:
            raise IlladaError("metrics_port is for a cluster of our own: a running one was started with its own port")

    @property
    def most(self) -> int:
        """The largest number of replicas that may run."""
        return self.max_replicas or self.replicas
