"""One answer on its way from the engine to a client, and what the engine's thread reports about it."""

import uuid
from dataclasses import dataclass, field
from typing import Literal

from illada.generation.engine import StepEvent
from illada.generation.optional.call_format import CallPiece, CallReader
from illada.generation.request import Request
from illada.serving.detokenize import Detokenizer, Token


@dataclass(frozen=True)
class Step:
    """What one step made of an answer: of its active block, and of blocks beside it that needed no pass."""

    event: StepEvent
    """Its lists begin at `start`."""
    forwards: int
    """Forward passes of the answer so far."""
    start: int = 0
    """Position in the answer."""


@dataclass(frozen=True)
class Update:
    """What has become of an answer since its last update."""

    ids: list[int]
    """Newly committed tokens in order, with no masked one before them; without the end-of-sequence token."""
    log_probs: list[float | None]
    """Log-probability of each id when it was committed; None for given text."""
    forwards: int
    """Forward passes of the answer so far."""
    steps: list[Step]
    """Every step since the last update, for answers that are watched."""
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    """The most probable ids at each id's place, with their log-probabilities, where they are wanted."""
    finish: Literal["stop", "length", "error"] | None = None
    """Why the answer ended, in its last update."""

    @property
    def size(self) -> int:
        """How many tokens it holds."""
        return len(self.ids) + sum(map(len, self.alternatives)) + sum(len(step.event.ids) for step in self.steps)


@dataclass(eq=False)
class Answer:
    """One choice of an HTTP response: its request to the engine, and the text that has come of the request.

    Only the engine's thread changes `reported` and `steps`; only the event loop changes what follows them.

    Args:
        index: number of the choice in the response.
        request: the request to the engine, checked by it.
        detokenizer: turns the answer's ids into text.
        limit: most tokens wanted; whole blocks may be computed beyond it.
        stream: whether updates are wanted before the end.
        slot: tokens of each slot where the answer is a whole text with slots, else 0.
        echo: whether the text begins with the prompt.
        reader: tells calls of tools from the rest of the text, where there may be some.
    """

    index: int
    request: Request
    detokenizer: Detokenizer
    limit: int
    stream: bool = False
    slot: int = 0
    echo: bool = False
    reader: CallReader | None = None
    reported: int = 0
    """Tokens that the updates so far hold."""
    steps: list[Step] = field(default_factory=list)
    """Steps since the last update."""
    arrived: float = 0.0
    """When the worker took it, in seconds of the monotonic clock."""
    committed: int = 0
    """Generated tokens in the updates so far."""
    content: str = ""
    """The text so far, without calls."""
    pieces: list[CallPiece] = field(default_factory=list)
    """What the last update brought of calls."""
    call_ids: list[str] = field(default_factory=list)
    """A name of its own for each call so far."""
    tokens: list[Token] = field(default_factory=list)
    _alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    """At each id so far; the detokenizer makes one token of each."""
    forwards: int = 0
    finish: str | None = None

    @property
    def generated(self) -> int:
        """Generated tokens so far: given text has no log-probability."""
        return sum(token.log_prob is not None for token in self.tokens)

    def fills(self) -> list[str]:
        """Return what was written into each slot of a text."""
        ids: list[int] = self.request.ids_G[self.request.slot_G].tolist()
        return [self.detokenizer.show(ids[start : start + self.slot]) for start in range(0, len(ids), self.slot)]

    def take(self, update: Update) -> tuple[str, list[Token]]:
        """Take an update; return the text and the tokens that can be sent now."""
        # A whole text begins with what is given before its first slot.
        lead = self.request.prompt_P.tolist() if (self.slot or self.echo) and not self.forwards else []
        if self.request.alternatives:
            self._alternatives += [*[[]] * len(lead), *update.alternatives]
        log_probs = [*[None] * len(lead), *update.log_probs]
        text, tokens = self.detokenizer.add([*lead, *update.ids], log_probs, last=update.finish is not None)
        if self._alternatives:
            first = len(self.tokens)
            tokens = [token._replace(alternatives=self._alternatives[first + at]) for at, token in enumerate(tokens)]
        self.finish = "stop" if self.detokenizer.stopped else update.finish
        if self.reader is not None:
            text, self.pieces = self.reader.take(text, last=update.finish is not None)
            self.call_ids += [f"call_{uuid.uuid4().hex}" for piece in self.pieces if piece.name is not None]
            if self.finish and self.call_ids:
                self.finish = "tool_calls"
        self.content += text
        self.tokens += tokens
        self.forwards = update.forwards
        return text, tokens
