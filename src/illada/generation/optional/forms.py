"""Answers that match a form, whatever the order they are written in (after DINGO, arXiv 2505.23061).

An automaton over tokens says which texts match. Over the positions of a block dynamic programming finds the most
probable ids at all masked positions that, with what is decided, lead to a state from which the form can still be met
within the tokens that are left; above temperature 0 it draws them from the same distribution. Any of them may then be
decided: the others stay possible. Where only one token is possible, or the form goes on with a fixed text, no pass is
needed.

Shape letters: M masked positions · V vocabulary · C classes of tokens · R states near the first · E their edges · L
positions of a stretch.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada.errors import IlladaError
from illada.generation.optional.byte_automaton import byte_automaton
from illada.generation.optional.schema import schema_regex
from illada.generation.optional.token_automaton import (
    Edges,
    TokenAutomaton,
    Tree,
    token_automaton,
    vocabulary_bytes,
)
from illada.generation.request import Request
from illada.generation.settings import GenerationSettings

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

LEAST = np.finfo(np.float32).min

LONGEST, MOST_STEPS = 200_000, 10_000_000
"""Characters of a regular expression; edges of its automaton times the length of a block (a tenth of a second)."""

MOST_BYTES = 2**28
"""Of the forms that are kept for a tokenizer."""


class Stretch(NamedTuple):
    """Neighbouring positions of an answer that an automaton leads through."""

    first: int
    last: int
    """The position behind it."""
    state: int
    left: int
    """Tokens that may follow it."""


@dataclass(frozen=True, eq=False)
class TokenForm:
    """What an answer must match: one expression for it or for each slot of a template, or one for each in order.

    Args:
        paths: one, or as many as there are slots.
    """

    paths: "tuple[TokenPath, ...]"

    def stretches(self, row: Request) -> "list[tuple[TokenPath, Stretch]]":
        """Return the active block, or each slot of a template (its neighbouring masks), with what leads through it."""
        if not row.template:
            return [(self.paths[0], Stretch(row.block, row.block_end, row.state, row.budget - row.block_end))]
        slots = slots_of(row)
        paths = self.paths * (len(slots) if len(self.paths) == 1 else 1)
        return [
            (path, Stretch(first, last, path.automaton.start, 0))
            for path, (first, last) in zip(paths, slots, strict=True)
        ]

    def leave_block(self, row: Request) -> None:
        """Bring the row's state to the end of the active block, in which all that matters is decided."""
        row.state = self.paths[0].automaton.walk(row.state, row.ids_G[row.block : row.block_end].tolist())

    def choose(self, row: Request, weight_MV: Tensor, choice_MV: Tensor, temperature: float) -> Tensor:
        """Return the ids at the open positions of a row [M] that match the form together.

        At temperature 0 they have the largest sum of weights. Above it they are drawn: weights are log-probabilities
        but for a constant, and choices, T times them less T log(-log u), say which token of several is taken.
        """
        weight, choice = weight_MV.float().cpu().numpy(), choice_MV.cpu().numpy()
        found: list[int] = []
        for path, stretch in self.stretches(row):
            own = slice(len(found), len(found) + int(np.count_nonzero(row.masked_G[stretch.first : stretch.last])))
            found += path.best(row, stretch, weight[own], choice[own], temperature)
        return torch.tensor(found, dtype=torch.int64, device=weight_MV.device)

    def settle(self, row: Request) -> None:
        """Decide the tokens of the active block that have no alternative, and fixed text behind what is decided."""
        for path, stretch in self.stretches(row):
            if row.masked_G[stretch.first : stretch.last].any():
                path.settle(row, stretch)


def slots_of(row: Request) -> list[list[int]]:
    """Return where each slot of a template begins and ends."""
    found: list[list[int]] = np.flatnonzero(np.diff(np.concatenate(([0], row.slot_G, [0])))).reshape(-1, 2).tolist()
    return found


@dataclass(frozen=True, eq=False)
class TokenPath:
    """An expression as an automaton over a tokenizer's tokens, and the best path through it.

    Args:
        automaton: of the whole answer, or of what fills a slot.
        encode: from bytes to ids whose bytes they are; [] where the tokenizer has another text in mind.
    """

    automaton: TokenAutomaton
    encode: Callable[[bytes], list[int]]

    # The choice

    def by_class(
        self, edges: Edges, weight_MV: NDArray[np.floating], choice_MV: NDArray[np.floating], summed: bool
    ) -> tuple[Floats, Floats]:
        """Return the weights and the choices of the classes that edges have [M, C].

        The choice of a class is that of its best id, and so is its weight, unless that is the log of the sum of the
        exponentials of its ids' weights. Of `anything`: the same of all ids; of classes without an id, or which no edge
        has: minus infinity.
        """
        automaton = self.automaton
        reached_C = np.zeros(automaton.nothing + 1, dtype=np.bool_)
        reached_C[edges.class_E] = True
        reached_C[automaton.anything :] = False
        rest = np.flatnonzero(~reached_C[automaton.class_V])
        # As long as the classes are made, `nothing` is that of all other ids.
        size_C = np.append(np.where(reached_C[: automaton.anything], automaton.size_C, 0), [0, len(rest)])
        order_V = np.append(automaton.order_I[np.repeat(reached_C[: automaton.anything], automaton.size_C)], rest)
        full = np.flatnonzero(size_C)
        size, first = size_C[full], (np.cumsum(size_C) - size_C)[full]
        best_MC = np.full((len(choice_MV), len(size_C)), -np.inf)
        sum_MC = best_MC.copy()
        for place in range(len(choice_MV)):  # one position at a time fits into the caches of a CPU
            best_MC[place, full] = np.maximum.reduceat(choice_MV[place][order_V], first)
            if summed:  # each class from its own best: what top-k cuts lies far below the rest
                weight_V = weight_MV[place][order_V]
                most = np.maximum(np.maximum.reduceat(weight_V, first), LEAST)
                weight_V -= np.repeat(most, size)
                with np.errstate(divide="ignore"):
                    sum_MC[place, full] = np.log(np.add.reduceat(np.exp(weight_V, out=weight_V), first)) + most
        best_MC[:, automaton.anything] = best_MC.max(1)
        sum_MC[:, automaton.anything] = np.logaddexp.reduce(sum_MC, axis=1)
        best_MC[:, automaton.nothing] = sum_MC[:, automaton.nothing] = -np.inf
        return sum_MC if summed else best_MC, best_MC

    def best(
        self,
        row: Request,
        stretch: Stretch,
        weight_MV: NDArray[np.floating],
        choice_MV: NDArray[np.floating],
        temperature: float,
    ) -> Iterator[int]:
        """Yield the ids at the masked positions of a stretch, from left to right."""
        automaton, edges = self.automaton, self.automaton.around(stretch.state, stretch.last - stretch.first)
        in_row = slice(stretch.first, stretch.last)
        masked_L, id_L = row.masked_G[in_row], row.ids_G[in_row]
        score_MC, best_MC = self.by_class(edges, weight_MV, choice_MV, temperature > 0)
        ahead_R = np.where(automaton.may_stand(stretch.left)[edges.state_S], 0.0, -np.inf)
        ahead = [ahead_R]
        masked_before = np.cumsum(masked_L) - 1
        for place in range(len(masked_L) - 1, -1, -1):
            if masked_L[place]:
                gain_E = score_MC[masked_before[place]][edges.class_E]
            else:
                gain_E = np.where(self._fits(edges, id_L[place]), 0.0, -np.inf)
            ahead_R = _join(gain_E + ahead_R[edges.next_E], edges, summed=temperature > 0)
            ahead.append(ahead_R)
        ahead.reverse()
        state = int(np.searchsorted(edges.state_S, stretch.state))
        for place, masked in enumerate(masked_L):
            own = edges.leaving(state)
            next_E, class_E = edges.next_E[own], edges.class_E[own]
            if not masked:
                state = int(next_E[self._fits_class(class_E, id_L[place])][0])
                continue
            number = masked_before[place]
            after_E = ahead[place + 1][next_E]
            total_E = best_MC[number][class_E] + (temperature * after_E if temperature else after_E)
            equal = np.flatnonzero(total_E == total_E.max())
            ids = [self._best_of(int(class_E[one]), choice_MV[number]) for one in equal]
            one = int(np.argmin(ids))  # of equal ones the first in the vocabulary, as without a form
            state = int(next_E[equal[one]])
            yield ids[one]

    def _best_of(self, number: int, choice_V: NDArray[np.floating]) -> int:
        """Return the best id of a class."""
        automaton = self.automaton
        if number == automaton.anything:
            return int(choice_V.argmax())
        first = automaton.first_C[number]
        ids = automaton.order_I[first : first + automaton.size_C[number]]
        return int(ids[choice_V[ids].argmax()])

    def _fits(self, edges: Edges, token: int) -> Bools:
        return self._fits_class(edges.class_E, token)

    def _fits_class(self, class_E: NDArray[np.int64], token: int) -> Bools:
        """Return which edges an id takes."""
        own, automaton = self.automaton.class_V[token], self.automaton
        return ((class_E == own) & (own != automaton.nothing)) | (class_E == automaton.anything)

    # What is left no choice

    def settle(self, row: Request, stretch: Stretch) -> None:
        """Decide what is fixed in a stretch: which states lead to an end, then from left to right which are come to."""
        automaton, edges = self.automaton, self.automaton.around(stretch.state, stretch.last - stretch.first)
        own = slice(stretch.first, stretch.last)
        masked_L, id_L = row.masked_G[own], row.ids_G[own]  # as they change
        real_E = edges.class_E != automaton.nothing
        alive = [automaton.may_stand(stretch.left)[edges.state_S]]
        for masked, token in zip(masked_L[::-1], id_L[::-1], strict=True):
            taken_E = real_E if masked else self._fits(edges, token)
            alive.append(np.logical_or.reduceat(taken_E & alive[-1][edges.next_E], edges.row_S))
        alive.reverse()
        here_R = edges.state_S == stretch.state
        left_edge = True
        for place in range(len(masked_L)):
            at = stretch.first + place
            if left_edge and masked_L[place]:
                fixed = self._fixed_text(edges, int(here_R.argmax()), masked_L[place:], alive[place:])
                self._decide(row, at, fixed)
            taken_E = real_E if masked_L[place] else self._fits(edges, id_L[place])
            own_E = taken_E & here_R[edges.source_E] & alive[place + 1][edges.next_E]
            here_R = np.zeros_like(here_R)
            here_R[edges.next_E[own_E]] = True
            if masked_L[place]:
                class_E = edges.class_E[own_E]
                first = class_E[0]
                if first < automaton.anything and automaton.size_C[first] == 1 and (class_E == first).all():
                    self._decide(row, at, [int(automaton.order_I[automaton.first_C[first]])])
            left_edge = left_edge and not masked_L[place]

    def _decide(self, row: Request, at: int, ids: Sequence[int]) -> None:
        """Decide neighbouring tokens; no pass looked at them, so their confidence is 1."""
        own = slice(at, at + len(ids))
        row.ids_G[own], row.masked_G[own], row.log_prob_G[own], row.forced_G[own] = ids, False, 0.0, True

    def _fixed_text(self, edges: Edges, state: int, masked_L: Bools, alive: Sequence[Bools]) -> list[int]:
        """Return the ids of the only text that the form goes on with from a state, as far as they are possible here.

        The last of them is left to the model where more may follow, as it might be written together with that.
        """
        automaton, of = self.automaton, self.automaton.bytes
        text, now = bytearray(), int(edges.state_S[state])
        while now < automaton.end and (byte := automaton.only_byte[now]) >= 0 and len(text) < 64 * len(masked_L):
            text.append(byte)
            now = int(of.next_SB[now, byte])
        ids = self.encode(bytes(text)) if text else []
        ended = now < automaton.end and automaton.final_S[now] and not (of.next_SB[now] >= 0).any()
        found: list[int] = []
        for place, token in enumerate(ids if ended else ids[:-1]):
            if place == len(masked_L) or not masked_L[place]:
                break
            own = edges.leaving(state)
            fits = np.flatnonzero(self._fits_class(edges.class_E[own], token))
            if not fits.size or not alive[place + 1][state := int(edges.next_E[own][fits[0]])]:
                break
            found.append(token)
        return found


def _join(value_E: Floats, edges: Edges, summed: bool) -> Floats:
    """Return over the edges of each state the best value, or the log of the sum of exponentials."""
    best_R = np.maximum.reduceat(value_E, edges.row_S)
    if not summed:
        return best_R
    base_R = np.where(np.isneginf(best_R), 0.0, best_R)
    with np.errstate(divide="ignore"):
        return np.log(np.add.reduceat(np.exp(value_E - base_R[edges.source_E]), edges.row_S)) + base_R


# Making and keeping


class _Words:
    """A tokenizer as forms see it."""

    def __init__(self, tokenizer: Any, vocabulary: int):
        self.vocabulary = vocabulary
        self._tokenizer = ref(tokenizer)  # which keeps this object, not the other way round
        self._bytes = vocabulary_bytes(tokenizer, vocabulary)
        self._tree = Tree.of(self._bytes)
        self._forms: OrderedDict[tuple[str, str, tuple[int, ...]], TokenPath] = OrderedDict()

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> "_Words":
        """Return what is known of a tokenizer, found out once."""
        with _lock:
            found = _known.get(tokenizer)
            if found is None or found.vocabulary != vocabulary:
                found = _known[tokenizer] = cls(tokenizer, vocabulary)
        return found

    def path(self, regex: str, kind: str, ending: tuple[int, ...]) -> TokenPath:
        """Return what leads through an expression, made once; the latest are kept, as many as `MOST_BYTES` hold."""
        with _lock:
            found = self._forms.get((regex, kind, ending))
        if found is None:
            found = TokenPath(token_automaton(byte_automaton(regex, kind), self._tree, ending, kind), self.encode)
        with _lock:
            found = self._forms.setdefault((regex, kind, ending), found)
            self._forms.move_to_end((regex, kind, ending))
            # What a form keeps for its next call grows as it is used.
            while len(self._forms) > 1 and sum(_size(one.automaton) for one in self._forms.values()) > MOST_BYTES:
                self._forms.popitem(last=False)
        return found

    def encode(self, text: bytes) -> list[int]:
        """Return the tokenizer's ids of a text; [] where it is no whole text, or its ids are another one's."""
        tokenizer = self._tokenizer()
        try:
            ids = [] if tokenizer is None else tokenizer.encode(text.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            return []
        same = all(token < self.vocabulary for token in ids)
        return ids if same and b"".join(self._bytes[token] or b"?" for token in ids) == text else []


_known: WeakKeyDictionary[Any, _Words] = WeakKeyDictionary()
_lock = Lock()


def _size(value: Any) -> int:
    """Return the bytes of all arrays in an object."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        value = getattr(value, "__dict__", {}).values()
    return sum(map(_size, list(value)))


def regexes_of(settings: GenerationSettings) -> tuple[list[str], str] | None:
    """Return the regular expression of a form, or of each slot, and what it was made of; None without a form.

    Raises:
        IlladaError: when a schema cannot be one.
    """
    if settings.regex is not None:
        return [settings.regex], "regex"
    if settings.json_schema is not None:
        if isinstance(settings.json_schema, str):
            raise IlladaError("json_schema is a text: give the schema itself")
        return [schema_regex(settings.json_schema)], "json_schema"
    if settings.choices:
        return ["|".join(map(re.escape, settings.choices))], "choices"
    return ([*settings.slot_regex], "slot_regex") if settings.slot_regex else None


def give_form(request: Request, tokenizer: Any, vocabulary: int, name: str) -> None:
    """Give a request the form that its settings ask for, and decide what that leaves no choice.

    Args:
        request: checked, with nothing decided.
        tokenizer: one of transformers.
        vocabulary: ids of the model.
        name: of the request, for errors.

    Raises:
        IlladaError: when the form cannot be used, or needs more tokens than there are.
    """
    found = regexes_of(request.settings)
    if found is None:
        return
    regexes, kind = found
    if tokenizer is None:
        raise IlladaError(f"{kind} needs a tokenizer: give one")
    longest = max(map(len, regexes))
    if longest > LONGEST:
        raise IlladaError(f"{kind} is a regular expression of {longest:,} characters, at most {LONGEST:,} are taken")
    slots = len(slots_of(request)) if request.template else 0
    if kind == "slot_regex" and len(regexes) != slots:
        raise IlladaError(
            f"{name}: slot_regex has {len(regexes)} expressions, the text {slots} slots: give one for each"
        )
    ending = tuple(token for token in request.settings.eos_ids if token < vocabulary)
    words = _Words.of(tokenizer, vocabulary)
    form = TokenForm(tuple(words.path(regex, kind, ending) for regex in regexes))
    request.form, request.state = form, form.paths[0].automaton.start
    for path, stretch in form.stretches(request):
        _check_room(path.automaton, stretch, kind, name)
    form.settle(request)
    while request.block_is_done:
        ended = np.isin(request.ids_G[request.block : request.block_end], request.settings.eos_ids).any()
        if request.template or ended or request.block_end == request.budget:
            # A request takes part in a pass at least.
            last = np.flatnonzero(~request.masked_G & request.slot_G)[-1]
            request.masked_G[last], request.forced_G[last] = True, False
            return
        request.open_next_block()


def _check_room(automaton: TokenAutomaton, stretch: Stretch, kind: str, name: str) -> None:
    """Check that what a form asks for has room, and that finding it is not too much work."""
    needed, room = int(automaton.distance_S[automaton.start]), stretch.last - stretch.first + stretch.left
    if needed > room:
        raise IlladaError(
            f"{name}: the shortest text that matches {kind} has {needed} tokens, the answer at most {room}: allow "
            "more tokens, or ask for less"
        )
    if not automaton.may_stand(room)[automaton.start]:
        raise IlladaError(f"{name}: no text that matches {kind} has exactly {room} tokens, and no id ends it before")
    if len(automaton.edges.class_E) * (stretch.last - stretch.first) > MOST_STEPS:
        raise IlladaError(f"{kind} is too large for blocks of this length: make it simpler, or block_length smaller")
