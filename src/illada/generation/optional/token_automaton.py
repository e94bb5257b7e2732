"""From an automaton over bytes to one over the tokens of a vocabulary.

Tokens that every state takes alike form a class: the automaton has an edge for each state and class, so its size
depends on the form that is asked for and hardly on the vocabulary.

Shape letters: V vocabulary · S states · B bytes · C classes · I ids that are in a class, ordered by class · E edges,
ordered by the state that they leave · N nodes of the vocabulary's tree · P pairs of a state and a node.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from illada.errors import IlladaError
from illada.generation.optional.byte_automaton import ByteAutomaton

MOST_PAIRS = 20_000_000
"""Steps of all tokens from all states that may be looked at (a second or two, and a GB)."""

UNREACHABLE = np.iinfo(np.int32).max

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tree:
    """A vocabulary as a tree of bytes, level by level.

    Attributes:
        first_N: where a node's children begin among all nodes; they lie beside each other.
        children_N: how many it has.
        byte_N: the byte that leads to it.
        text_N: number of the text that ends at it, -1 for none.
        text_V: number of each id's text, -1 for ids without one (special tokens).
        texts: how many there are.
    """

    first_N: Ints
    children_N: Ints
    byte_N: Ints
    text_N: Ints
    text_V: Ints
    texts: int

    @classmethod
    def of(cls, token_bytes: Sequence[bytes | None]) -> "Tree":
        """Build it from the bytes of each id; None, and ids of no bytes, are no text."""
        texts = sorted({one for one in token_bytes if one})
        number = {text: place for place, text in enumerate(texts)}
        text_V = np.array([number[one] if one else -1 for one in token_bytes], dtype=np.int64)
        first, children, byte, ends = [0], [0], [0], [-1]
        level = [(0, 0, len(texts))]  # each node with the texts that begin with its own
        depth = 0
        while level:
            below = []
            for node, begin, high in level:
                low = begin
                if low < high and len(texts[low]) == depth:
                    ends[node] = low
                    low += 1
                first[node] = len(first)
                for one, group in groupby(enumerate(texts[low:high], low), lambda item, at=depth: item[1][at]):  # type: ignore[misc]
                    own = [place for place, _ in group]
                    below.append((len(first), own[0], own[-1] + 1))
                    for column, value in ((first, 0), (children, 0), (byte, one), (ends, -1)):
                        column.append(value)
                    children[node] += 1
            level, depth = below, depth + 1
        first_N, children_N, byte_N, text_N = (np.array(column) for column in (first, children, byte, ends))
        return cls(first_N, children_N, byte_N, text_N, text_V, len(texts))


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges that leave some states, ordered by state; each state has one of class `nothing` first."""

    state_S: Ints
    """The states."""
    row_S: Ints
    """Where the edges of each begin."""
    class_E: Ints
    next_E: Ints
    """Number of the next among the states."""

    def leaving(self, state: int) -> slice:
        """Return where the edges of a state lie, by its number among the states."""
        return slice(self.row_S[state], self.row_S[state + 1] if state + 1 < len(self.row_S) else None)

    @cached_property
    def source_E(self) -> Ints:  # noqa: N802
        """The state that each edge leaves, by its number among the states."""
        return np.repeat(np.arange(len(self.row_S)), np.diff(self.row_S, append=len(self.class_E)))


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton over tokens, with what comes after the end.

    Its last state is the end, which an id that ends the answer leads to from every final state; every id leads from
    the end to itself. Three classes stand behind those of tokens: `ending` (ids that end the answer), `anything` (all
    ids) and `nothing`, whose edges are never taken.

    Attributes:
        start: the first state.
        final_S: whether an answer may end in a state.
        distance_S: how many tokens an answer needs at least from a state on; `UNREACHABLE` where none helps.
        class_V: class of each id; `nothing` for ids that no state takes.
        order_I: ids by class, in ascending order within one.
        first_C: where each class begins in it.
        size_C: how many ids are in it.
        edges: of all states.
        bytes: the automaton over bytes it was made of, whose states are its own, but for the end.
        ending: whether there is an id that ends an answer; without one all of the answer must be filled.
    """

    start: int
    final_S: NDArray[np.bool_]
    distance_S: Ints
    class_V: Ints
    order_I: Ints
    first_C: Ints
    size_C: Ints
    edges: Edges
    bytes: ByteAutomaton
    ending: bool
    near: OrderedDict[tuple[int, int], Edges] = field(default_factory=OrderedDict)
    exactly: list[NDArray[np.bool_]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    @property
    def end(self) -> int:
        """The state after the end."""
        return len(self.final_S) - 1

    @property
    def anything(self) -> int:
        """The class of all ids."""
        return len(self.size_C)

    @property
    def nothing(self) -> int:
        """The class of no id."""
        return len(self.size_C) + 1

    def around(self, start: int, steps: int) -> Edges:
        """Return the edges between states that so many tokens come to from a start; kept for the next call."""
        with self.lock:
            if (found := self.near.get((start, steps))) is None:
                found = self.near[start, steps] = _around(self, start, steps)
                if len(self.near) > 8:
                    self.near.popitem(last=False)
        return found

    def may_stand(self, left: int) -> NDArray[np.bool_]:
        """Return in which states an answer may be when so many tokens are left [S]."""
        if self.ending:
            return self.distance_S <= left
        with self.lock:
            if not self.exactly:
                self.exactly.append(self.final_S)
            real_E = self.edges.class_E != self.nothing
            while len(self.exactly) <= left:
                on_E = real_E & self.exactly[-1][self.edges.next_E]
                self.exactly.append(np.logical_or.reduceat(on_E, self.edges.row_S))
            return self.exactly[left]

    @cached_property
    def only_byte(self) -> NDArray[np.int32]:
        """The only byte that each state takes if it is not final, else -1 [S]."""
        taken_SB = self.bytes.next_SB >= 0
        only_S = (taken_SB.sum(1) == 1) & ~self.bytes.final_S
        return np.where(only_S, taken_SB.argmax(1), -1).astype(np.int32)

    def walk(self, state: int, ids: Sequence[int]) -> int:
        """Return the state that ids lead to from another."""
        edges = self.edges
        for token in ids:
            if state == self.end:
                break
            own = slice(edges.row_S[state] + 1, edges.leaving(state).stop)  # without the edge of `nothing`
            state = int(edges.next_E[own][edges.class_E[own] == self.class_V[token]][0])
        return state


def token_automaton(of: ByteAutomaton, tree: Tree, ending: Sequence[int], name: str) -> TokenAutomaton:
    """Return the automaton over the tokens of a vocabulary.

    Args:
        of: the automaton over bytes.
        tree: the vocabulary.
        ending: ids that end an answer, perhaps none.
        name: of the form, for errors.

    Raises:
        IlladaError: when it is too large, or when no tokens make such an answer.
    """
    state_P, text_P, next_P = _steps(of, tree, name)
    free = np.setdiff1d(np.flatnonzero(tree.text_V >= 0), ending)  # an id that ends an answer is no text of it
    taken = np.isin(text_P, tree.text_V[free])
    state_P, text_P, next_P = state_P[taken], text_P[taken], next_P[taken]
    keys = np.random.default_rng(0).integers(0, 2**63, (2, 2), dtype=np.uint64) | np.uint64(1)
    step_P = state_P * np.int64(len(of.final_S)) + next_P
    taken_T2 = np.zeros((tree.texts, 2), dtype=np.uint64)
    for column in range(2):  # 128 bits of a hash of all that a text does
        mixed_P = (step_P.astype(np.uint64) + keys[column, 0]) * np.uint64(0x9E3779B97F4A7C15)
        mixed_P = (mixed_P ^ (mixed_P >> np.uint64(29))) * keys[column, 1]
        np.add.at(taken_T2[:, column], text_P, mixed_P ^ (mixed_P >> np.uint64(32)))
    used_T = np.zeros(tree.texts, dtype=np.bool_)
    used_T[text_P] = True
    used = np.flatnonzero(used_T)
    _, example, class_U = np.unique(taken_T2[used], axis=0, return_index=True, return_inverse=True)
    class_T = np.full(tree.texts + 1, -1)
    class_T[used] = class_U.ravel()
    class_V = class_T[tree.text_V]
    classes, states = len(example), len(of.final_S)
    class_V[list(ending)] = classes
    class_V[class_V < 0] = classes + 2
    chosen_P = np.isin(text_P, used[example])
    final, every = np.flatnonzero(of.final_S if ending else of.final_S[:0]), np.arange(states + 1)
    source = np.concatenate((state_P[chosen_P], final, [states], every))
    by = np.concatenate((class_T[text_P[chosen_P]], np.full(len(final), classes), [classes + 1]))
    by = np.concatenate((by, np.full(states + 1, classes + 2)))
    target = np.concatenate((next_P[chosen_P], np.full(len(final), states), [states], every))
    rank = np.lexsort((by != classes + 2, source))  # the edge of `nothing` first
    source, by, target = source[rank], by[rank], target[rank]
    edges = Edges(every, np.searchsorted(source, every), by, target)
    final_S = np.append(of.final_S, True)
    distance_S = _distances(edges, final_S, classes + 2)
    if distance_S[of.start] == UNREACHABLE:
        raise IlladaError(f"{name}: no tokens of this vocabulary make such an answer")
    in_class = np.flatnonzero(class_V <= classes)
    order_I = in_class[np.argsort(class_V[in_class], kind="stable")]
    size_C = np.bincount(class_V[in_class], minlength=classes + 1)
    first_C = np.concatenate(([0], np.cumsum(size_C)[:-1]))
    return TokenAutomaton(of.start, final_S, distance_S, class_V, order_I, first_C, size_C, edges, of, bool(ending))


def _steps(of: ByteAutomaton, tree: Tree, name: str) -> tuple[Ints, Ints, Ints]:
    """Return all steps that texts of the vocabulary make: from a state, by a text, to a state."""
    origin = state = np.arange(len(of.final_S))
    node = np.zeros_like(origin)
    found: list[tuple[Ints, Ints, Ints]] = []
    looked_at = 0
    while len(node):
        count = tree.children_N[node]
        looked_at += int(count.sum())
        if looked_at > MOST_PAIRS:
            raise IlladaError(f"{name} needs too large an automaton for this vocabulary: make it simpler")
        child = np.repeat(tree.first_N[node] - np.cumsum(count) + count, count) + np.arange(count.sum())
        origin, state = np.repeat(origin, count), np.repeat(state, count)
        state = of.next_SB[state, tree.byte_N[child]].astype(np.int64)
        alive = state >= 0
        origin, state, node = origin[alive], state[alive], child[alive]
        text = tree.text_N[node]
        whole = text >= 0
        found.append((origin[whole], text[whole], state[whole]))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)] if found else [np.zeros(0, int)] * 3
    return columns[0], columns[1], columns[2]


def _distances(edges: Edges, final_S: NDArray[np.bool_], nothing: int) -> Ints:
    """Return how many tokens lead from each state to a final one, at least."""
    distance_S = np.where(final_S, 0, UNREACHABLE)
    steps, real_E = 0, edges.class_E != nothing
    while True:
        near = edges.source_E[real_E & (distance_S[edges.next_E] == steps)]
        near = near[distance_S[near] == UNREACHABLE]
        if not near.size:
            return distance_S
        steps += 1
        distance_S[near] = steps


def _around(automaton: TokenAutomaton, start: int, steps: int) -> Edges:
    """Return what `TokenAutomaton.around` keeps."""
    edges, useful_S = automaton.edges, automaton.distance_S < UNREACHABLE
    ends = np.append(edges.row_S, len(edges.class_E))
    seen_S = np.zeros(len(useful_S), dtype=np.bool_)
    seen_S[start] = True
    fresh = np.array([start])
    for _ in range(steps):
        found = np.unique(edges.next_E[_rows(ends, fresh)])
        fresh = found[useful_S[found] & ~seen_S[found]]
        if not fresh.size:
            break
        seen_S[fresh] = True
    state_S = np.flatnonzero(seen_S)
    at_E = _rows(ends, state_S)
    source_E = np.repeat(state_S, ends[state_S + 1] - ends[state_S])
    inside_E = seen_S[edges.next_E[at_E]]
    at_E, source_E = at_E[inside_E], source_E[inside_E]
    number_S = np.cumsum(seen_S) - 1
    return Edges(state_S, np.searchsorted(source_E, state_S), edges.class_E[at_E], number_S[edges.next_E[at_E]])


def _rows(ends: Ints, states: Ints) -> Ints:
    """Return the places of all edges of some states."""
    count = ends[states + 1] - ends[states]
    return np.repeat(ends[states] - np.cumsum(count) + count, count) + np.arange(count.sum())


def vocabulary_bytes(tokenizer: Any, size: int) -> list[bytes | None]:
    """Return the bytes of each id below a vocabulary's size, None for special tokens and for ids that mean none.

    Raises:
        IlladaError: when the tokenizer is not one of bytes, as GPT-2's and those of the released models are.
    """
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):
        raise IlladaError("answers of a given form need a byte-level tokenizer, which this one is not")
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in plain}
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(b for b in range(256) if b not in plain)}
    special = {*tokenizer.all_special_ids}
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    found: list[bytes | None] = [None] * size
    for token, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))):
        if token not in special and piece is not None:
            known = [byte_of.get(letter) for letter in piece]
            # What a user added stands there as it is.
            found[token] = piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
    return found
