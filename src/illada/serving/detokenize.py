"""From ids to text while an answer forms: what may be sent already, and what each token looks like."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from illada.text.prompts import show_ids


class Token(NamedTuple):
    """A token of an answer."""

    id: int
    log_prob: float | None
    """None for given text."""
    end: int
    """Where it ends in the text, special tokens included."""
    text: str
    """Its visible text."""
    offset: int
    """Where its visible text begins in the visible text of the answer."""
    alternatives: Sequence[tuple[int, float]] = ()
    """The most probable ids at its place, with their log-probabilities, best first."""


class Detokenizer:
    """The text of one answer, sent piece by piece in order and never taken back.

    Stop strings are looked for in the text with special tokens, as the engine does; the pieces have no special tokens.

    Args:
        tokenizer: one of transformers' fast tokenizers.
        stop: strings that end the answer and are left out of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = frozenset(tokenizer.all_special_ids)
        self._stream = DecodeStream(skip_special_tokens=False)
        self._raw = ""
        self._hidden: set[int] = set()
        self._tokens: list[Token] = []
        self._pending: list[tuple[int, float | None]] = []
        self._sent_text = self._sent_tokens = self._visible_length = 0
        self.stopped = False
        """Whether a stop string has come; tokens after it are ignored."""

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return show_ids(self._tokenizer, ids)

    def add(self, ids: Sequence[int], log_probs: Sequence[float | None], last: bool = False) -> tuple[str, list[Token]]:
        """Take the next committed tokens; return the text and the tokens that can be sent now.

        Args:
            ids: the next tokens, in order.
            log_probs: log-probability of each.
            last: whether no more will come, so that nothing has to be kept back.
        """
        if self.stopped:
            return "", []
        before = len(self._raw)
        for token_id, log_prob in zip(ids, log_probs, strict=True):
            self._pending.append((token_id, log_prob))
            if piece := self._stream.step(self._tokenizer.backend_tokenizer, token_id) or "":
                if token_id in self._special:
                    # The piece may begin with bytes of a character that the special token cut short.
                    end = len(self._raw) + len(piece)
                    self._hidden.update(range(end - len(self._tokenizer.decode([token_id])), end))
                self._append(piece)
        if last:
            # Bytes of a character that was never completed.
            whole = self._tokenizer.decode([token.id for token in self._tokens] + [i for i, _ in self._pending])
            self._append(whole[len(self._raw) :] if whole.startswith(self._raw) else "")
        reach = max(map(len, self._stop), default=0)
        places = [self._raw.find(stop, max(0, before - reach + 1)) for stop in self._stop]
        sure = len(self._raw) if last else len(self._raw) - self._held_back()
        # Before the first stop string, another that is still incomplete may have begun.
        if (cuts := [place for place in places if place >= 0]) and min(cuts) <= sure:
            self.stopped = True
            return self._send(min(cuts))
        return self._send(sure)

    def _append(self, piece: str) -> None:
        """Append the text of the pending tokens; the last of them gets all of it."""
        texts = [""] * (len(self._pending) - 1) + [piece]
        for (token_id, log_prob), text in zip(self._pending, texts, strict=False):
            begin = len(self._raw)
            self._raw += text
            visible = self._visible(begin, len(self._raw))
            self._tokens.append(Token(token_id, log_prob, len(self._raw), visible, self._visible_length))
            self._visible_length += len(visible)
        self._pending = []

    def _held_back(self) -> int:
        """Return how many characters at the end may begin a stop string."""
        beginnings = (stop[:size] for stop in self._stop for size in range(1, len(stop)))
        return max((len(start) for start in beginnings if self._raw.endswith(start)), default=0)

    def _send(self, end: int) -> tuple[str, list[Token]]:
        text = self._visible(self._sent_text, end)
        tokens = list(takewhile(lambda token: token.end <= end, self._tokens[self._sent_tokens :]))
        self._sent_text, self._sent_tokens = end, self._sent_tokens + len(tokens)
        return text, tokens

    def _visible(self, begin: int, end: int) -> str:
        """Return the text between two places without special tokens."""
        return "".join(self._raw[place] for place in range(begin, end) if place not in self._hidden)


class TokenTexts:
    """Gives the text of single tokens, to show an answer that is not in order yet."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._one = lru_cache(maxsize=65_536)(lambda token_id: show_ids(tokenizer, [token_id]))

    def __call__(self, ids: Sequence[int | None]) -> list[str]:
        """Return one text per token, "" for None; a character made of several tokens stands at the last of them."""
        texts = ["" if token_id is None else self._one(token_id) for token_id in ids]
        broken: list[int] = []
        for place, (token_id, text) in enumerate(zip(ids, texts, strict=True)):
            if token_id is None or "\ufffd" not in text:
                broken = []
                continue
            broken.append(token_id)
            texts[place] = show_ids(self._tokenizer, broken)
            if len(broken) > 1:
                texts[place - 1] = ""
            if "\ufffd" not in texts[place]:
                broken = []
        return texts
