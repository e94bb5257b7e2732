"""From a regular expression to the smallest deterministic automaton over bytes, bounded in size and in work.

Python parses the expression; its nondeterministic automaton over UTF-8 becomes a deterministic one by sets of states,
and equal states become one. No library did this: docs/structured.md says what was tried.

Shape letters: S states · B 256 bytes.
"""

import re
import sys
from collections.abc import Iterable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from illada.errors import IlladaError

MOST_NODES, MOST_STATES, MOST_WORK = 50_000, 20_000, 1_500_000
"""Of the nondeterministic automaton, of the deterministic one, and steps from one to the other (a second or two)."""

Ranges = list[tuple[int, int]]
"""Code points or bytes from one to another, both included."""

LAST = sys.maxunicode
CATEGORIES: dict[Any, Ranges] = {
    op.CATEGORY_DIGIT: [(48, 57)],
    op.CATEGORY_WORD: [(48, 57), (65, 90), (95, 95), (97, 122)],
    op.CATEGORY_SPACE: [(9, 13), (32, 32)],
}
OPPOSITES = {
    op.CATEGORY_NOT_DIGIT: op.CATEGORY_DIGIT,
    op.CATEGORY_NOT_WORD: op.CATEGORY_WORD,
    op.CATEGORY_NOT_SPACE: op.CATEGORY_SPACE,
}
REFUSED = {
    op.ASSERT: "lookahead and lookbehind",
    op.ASSERT_NOT: "lookahead and lookbehind",
    op.GROUPREF: "references to groups",
    op.GROUPREF_EXISTS: "conditions on groups",
    op.AT: "^, $ and \\b anywhere but ^ at the beginning and $ at the end",
    op.ATOMIC_GROUP: "atomic groups",
    op.POSSESSIVE_REPEAT: "possessive repetitions",
}


class ByteAutomaton(NamedTuple):
    """A deterministic automaton over bytes; every state can still come to a final one."""

    start: int
    final_S: NDArray[np.bool_]
    next_SB: NDArray[np.int32]
    """Successor of each state by each byte, -1 for none."""


def byte_automaton(regex: str, name: str = "regex") -> ByteAutomaton:
    r"""Return the smallest automaton of the texts that a regular expression matches as a whole.

    The syntax is Python's, with \d, \w and \s in ASCII.

    Raises:
        IlladaError: when it is none, cannot be an automaton, matches nothing, or is too large; `name` says whose.
    """
    try:
        parsed = _parser.parse(regex)
        regex.encode()
    except RecursionError:
        raise IlladaError(f"{name} is nested too deeply: make it simpler") from None
    except (re.error, OverflowError, UnicodeEncodeError) as error:
        raise IlladaError(f"{name} is no regular expression: {str(error)[:200]!s}") from None
    if parsed.state.flags & (re.IGNORECASE | re.MULTILINE | re.LOCALE):
        raise IlladaError(f"{name} has a flag that is not supported: leave out (?i), (?m) and (?L)")
    builder = _Builder(name, bool(parsed.state.flags & re.DOTALL))
    try:
        end = builder.sequence(_without_anchors(parsed), 0)
    except RecursionError:
        raise IlladaError(f"{name} is nested too deeply: make it simpler") from None
    return _smallest(*_deterministic(builder, end), name)


def _without_anchors(parsed: Any) -> list[Any]:
    """Return the items of an expression without ^ at its beginning and $ at its end, which a whole match implies."""
    items = list(parsed)
    if items and items[0][0] is op.AT and items[0][1] in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        items = items[1:]
    if items and items[-1][0] is op.AT and items[-1][1] in (op.AT_END, op.AT_END_STRING):
        items = items[:-1]
    return items


class _Builder:
    """Builds a nondeterministic automaton; its first state is 0."""

    def __init__(self, name: str, dot_all: bool):
        self.name = name
        self.any: Ranges = [(0, LAST)] if dot_all else [(0, 9), (11, LAST)]
        self.ranges_read = 0
        self.free: list[list[int]] = [[]]
        """Successors of each state that take no byte."""
        self.edges: list[list[tuple[int, int, int]]] = [[]]
        """Of each state the first and the last byte, and the successor by them."""

    def state(self) -> int:
        """Return a new state."""
        if len(self.free) >= MOST_NODES:
            raise self.too_large()
        self.free.append([])
        self.edges.append([])
        return len(self.free) - 1

    def read(self, ranges: int) -> None:
        """Count ranges of characters, those of a class once for each place where it stands."""
        self.ranges_read += ranges
        if self.ranges_read > 4 * MOST_NODES:
            raise self.too_large()

    def too_large(self) -> IlladaError:
        """Return the error to raise when a limit is passed."""
        return IlladaError(
            f"{self.name} needs too large an automaton: make it simpler, above all repetitions with large bounds"
        )

    def sequence(self, items: Iterable[Any], start: int) -> int:
        """Add items one after another from a state on; return the state behind them."""
        for kind, argument in items:
            start = self.item(kind, argument, start)
        return start

    def item(self, kind: Any, argument: Any, start: int) -> int:
        """Add one item of a parsed expression from a state on; return the state behind it."""
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return self.characters(self.ranges(kind, argument), start)
        if kind is op.BRANCH:
            ends = [self.sequence(branch, self.behind(start)) for branch in argument[1]]
            end = self.state()
            for one in ends:
                self.free[one].append(end)
            return end
        if kind is op.SUBPATTERN and not argument[1] and not argument[2]:
            return self.sequence(argument[3], start)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, items = argument
            return self.repetition(least, most, items, start)
        what = REFUSED.get(kind, "flags inside an expression" if kind is op.SUBPATTERN else str(kind).lower())
        raise IlladaError(f"{self.name} cannot be an automaton: {what} are not supported")

    def behind(self, start: int) -> int:
        """Return a new state that follows another without a byte."""
        state = self.state()
        self.free[start].append(state)
        return state

    def repetition(self, least: int, most: Any, items: Any, start: int) -> int:
        """Add a repetition."""
        for _ in range(least):
            start = self.sequence(items, self.behind(start))
        if most is op.MAXREPEAT:
            begin = self.behind(start)
            self.free[self.sequence(items, begin)].append(begin)
            return self.behind(begin)
        ends = [start]
        for _ in range(least, most):
            ends.append(start := self.sequence(items, self.behind(start)))
        end = self.state()
        for one in ends:
            self.free[one].append(end)
        return end

    def ranges(self, kind: Any, argument: Any) -> Ranges:
        """Return the code points that an item stands for."""
        if kind is op.ANY:
            return self.any
        if kind is op.NOT_LITERAL:
            return others([(argument, argument)])
        if kind is op.LITERAL:
            return [(argument, argument)]
        self.read(len(argument))
        found: Ranges = []
        for inner, value in argument:
            if inner is op.RANGE:
                found.append(value)
            elif inner is op.LITERAL:
                found.append((value, value))
            elif inner is op.CATEGORY:
                found += CATEGORIES[value] if value in CATEGORIES else others(CATEGORIES[OPPOSITES[value]])
        rest = others(found)
        return rest if argument[0][0] is op.NEGATE else others(rest)  # in order, none of them twice

    def characters(self, ranges: Ranges, start: int) -> int:
        """Add one character of some ranges of code points."""
        end = self.state()
        for first, last in ranges:
            for low, high in ((first, min(last, 0xD7FF)), (max(first, 0xE000), last)):  # no surrogates in UTF-8
                for bytes_of_one in _utf8(low, high):
                    state = start
                    for number, (least, most) in enumerate(bytes_of_one):
                        to = end if number == len(bytes_of_one) - 1 else self.state()
                        self.edges[state].append((least, most, to))
                        state = to
        return end


def others(ranges: Ranges) -> Ranges:
    """Return the code points outside of ranges."""
    found, begin = [], 0
    for first, last in sorted(ranges):
        if first > begin:
            found.append((begin, first - 1))
        begin = max(begin, last + 1)
    return [*found, (begin, LAST)] if begin <= LAST else found


def _utf8(first: int, last: int) -> list[Ranges]:
    """Return the UTF-8 of a range of code points as sequences of ranges of bytes."""
    if first > last:
        return []
    for limit in (0x7F, 0x7FF, 0xFFFF):
        if first <= limit < last:
            return [*_utf8(first, limit), *_utf8(limit + 1, last)]
    # Below the first place where they differ, bytes must run from the least to the largest.
    for bits in (6, 12, 18):
        low = (1 << bits) - 1
        if last > 0x7F and first >> bits != last >> bits:
            if first & low:
                return [*_utf8(first, first | low), *_utf8((first | low) + 1, last)]
            if last & low != low:
                return [*_utf8(first, (last & ~low) - 1), *_utf8(last & ~low, last)]
    return [list(zip(chr(first).encode(), chr(last).encode(), strict=True))]


def _closures(builder: _Builder, wanted: set[int]) -> dict[int, frozenset[int]]:
    """Return for each wanted state those that it comes to without a byte, itself included."""
    free, found, work = builder.free, {}, 0
    for state in wanted:
        seen, waiting = {state}, [state]
        while waiting:
            for one in free[waiting.pop()]:
                if one not in seen:
                    seen.add(one)
                    waiting.append(one)
        found[state] = frozenset(seen)
        work += len(seen)
        if work > MOST_WORK:
            raise builder.too_large()
    return found


def _deterministic(builder: _Builder, end: int) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Return which states of the deterministic automaton are final, and its successors; its first state is 0."""
    edges = builder.edges
    starts = sorted({0} | {edge[0] for of in edges for edge in of} | {edge[1] + 1 for of in edges for edge in of})
    number_of = {byte: number for number, byte in enumerate(starts)}
    number_of.setdefault(256, len(starts))
    after = {edge[2] for of in edges for edge in of}
    kept = {state for state, of in enumerate(edges) if of} | {end}  # what else is there takes no part
    closed = {state: found & kept for state, found in _closures(builder, after | {0}).items()}
    sets, rows, work = {closed[0]: 0}, [], 0
    waiting = [closed[0]]
    for states in waiting:
        targets: dict[int, set[int]] = {}
        for state in states:
            for first, last, to in edges[state]:
                for number in range(number_of[first], number_of[last + 1]):
                    targets.setdefault(number, set()).update(closed[to])
                    work += 1 + len(closed[to])
        row = [-1] * len(starts)
        for number, target in targets.items():
            one = frozenset(target)
            if one not in sets:
                sets[one] = len(sets)
                waiting.append(one)
            row[number] = sets[one]
        rows.append(row)
        if len(sets) > MOST_STATES or work > MOST_WORK:
            raise builder.too_large()
    width = np.diff([*starts, 256]) if starts[-1] < 256 else np.diff(starts)
    table = np.array(rows, dtype=np.int32)[:, : len(width)]
    return np.array([end in states for states in waiting]), np.repeat(table, width, axis=1)


def _smallest(final_S: NDArray[np.bool_], next_SB: NDArray[np.int32], name: str) -> ByteAutomaton:
    """Leave out what comes to no end, and make one of the states that nothing tells apart (Moore's algorithm).

    Raises:
        IlladaError: when no end can be reached.
    """
    dead = len(final_S)  # a last state, which no text leaves, stands for -1
    _, byte = np.unique(next_SB, axis=1, return_index=True)  # of bytes that all states take alike, one each
    to_SB = np.append(np.where(next_SB < 0, dead, next_SB), np.full((1, 256), dead), 0)
    state_S = _lengths(np.append(final_S, False), to_SB[:, byte])
    if not state_S[0]:
        raise IlladaError(f"{name} matches nothing: no answer could be given")
    live_S, count, work = state_S > 0, 0, 0
    while (found := len(np.unique(state_S))) != count:
        if (work := work + len(state_S) * len(byte)) > 20 * MOST_WORK:
            state_S = np.where(live_S, np.arange(1, len(live_S) + 1), 0)  # more states, the same texts
            count = len(np.unique(state_S))
            break
        count, before_S = found, np.unique(state_S, return_inverse=True)[1]
        state_S = before_S
        for column in byte:
            state_S = np.unique(state_S * (count + 1) + before_S[to_SB[:, column]], return_inverse=True)[1]
    _, kept, state_S = np.unique(state_S, return_index=True, return_inverse=True)
    kept = kept[np.arange(count) != state_S[dead]]
    number = np.full(count, -1)
    number[state_S[kept]] = np.arange(len(kept))
    return ByteAutomaton(int(number[state_S[0]]), final_S[kept], number[state_S[to_SB[kept]]].astype(np.int32))


def _lengths(final_S: NDArray[np.bool_], to_SC: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number for each state that equal states share: of its shortest and its longest text; 0 of the dead one.

    That tells most states apart, and saves most rounds of what follows.

    Args:
        final_S: which states are final; the last one is dead.
        to_SC: their successors.
    """
    states, dead = len(final_S), len(final_S) - 1
    source = np.repeat(np.arange(states), to_SC.shape[1])
    order = np.argsort(to_SC, axis=None, kind="stable")
    source, begin = source[order], np.searchsorted(to_SC.ravel()[order], np.arange(states + 1))

    def before(some: NDArray[np.int64]) -> NDArray[np.int64]:
        count = begin[some + 1] - begin[some]
        return source[np.repeat(begin[some] - np.cumsum(count) + count, count) + np.arange(count.sum())]

    shortest_S, fresh = np.where(final_S, 0, -1), np.flatnonzero(final_S)
    for length in range(1, states + 1):
        near = before(fresh)
        fresh = np.unique(near[shortest_S[near] < 0])
        if not fresh.size:
            break
        shortest_S[fresh] = length
    shortest_S[dead] = -1
    # A longest text has each state whose successors all have one.
    longest_S, waiting_S = np.full(states, -1), np.full(states, to_SC.shape[1])
    fresh = np.flatnonzero(shortest_S < 0)
    for length in range(states + 1):
        longest_S[fresh] = length
        near, count = np.unique(before(fresh), return_counts=True)
        waiting_S[near] -= count
        fresh = near[(waiting_S[near] == 0) & (longest_S[near] < 0)]
        if not fresh.size:
            break
    return np.where(shortest_S < 0, 0, 1 + shortest_S * (states + 2) + longest_S + 1)
