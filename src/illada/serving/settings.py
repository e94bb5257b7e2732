"""How to serve: limits, keys, addresses. Imports no torch."""

from dataclasses import dataclass

from illada.errors import IlladaError


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server (all ours).

    Args:
        host: address to listen on; 127.0.0.1 is reachable from this machine only.
        port: to listen on; 0 takes a free one.
        name: of the model in the API; null for the folder's.
        api_key_file: file with an API key on each line; null for those in the environment variable ILLADA_API_KEYS,
            separated by commas. Without keys everyone who reaches the address may ask.
        cors_origins: web origins whose pages may ask, as https://example.org; none by default.
        allowed_hosts: names of this server in requests; none takes any where host is not a loopback address, else the
            loopback names, so that other sites' pages cannot reach it under a name of theirs (DNS rebinding).
        max_requests: most answers under way and waiting; more are refused with 429.
        max_choices: most answers to one prompt (`n`).
        max_body_bytes: largest request.
        max_batch_tokens: most positions of one forward pass.
        max_past_tokens: most positions whose keys and values are kept.
        request_timeout: seconds within which an answer must be finished, its wait included.
        drain_timeout: seconds that answers under way get when the server is asked to end.
        log_prompts: write prompts and answers to the log.

    Raises:
        IlladaError: when a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_requests: int = 256
    max_choices: int = 8
    max_body_bytes: int = 1_000_000
    max_batch_tokens: int = 2048
    max_past_tokens: int = 2**16
    request_timeout: float = 600.0
    drain_timeout: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        for name in ("cors_origins", "allowed_hosts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 <= self.port < 2**16:
            raise IlladaError(f"port is {self.port}: it must be between 0 and 65535")
        for name in ("max_requests", "max_choices", "max_body_bytes", "max_batch_tokens", "max_past_tokens"):
            if getattr(self, name) < 1:
                raise IlladaError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("request_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise IlladaError(f"{name} is {getattr(self, name):g}: it must be a number of seconds above 0")
        if self.max_choices > self.max_requests:
            raise IlladaError("max_choices is larger than max_requests: raise max_requests")
