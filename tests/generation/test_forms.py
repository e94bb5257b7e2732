"""Answers of a given form: automata against Python's `re`, the choice against all fillings, answers in any company."""

import itertools
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import special, stats

from illada import rng
from illada.errors import IlladaError
from illada.generation.engine import generate, infill
from illada.generation.optional import forms
from illada.generation.optional.byte_automaton import byte_automaton
from illada.generation.optional.forms import TokenForm, TokenPath, give_form
from illada.generation.optional.token_automaton import UNREACHABLE, Tree, token_automaton
from illada.generation.request import Request
from illada.generation.settings import GenerationSettings
from illada.model.kv_cache import KVCache
from reference import reference_fillings

END, MASK = 2, 5


class Letters:
    """A byte-level tokenizer of 64 ids: special ones, letters, pairs of letters."""

    pieces: ClassVar = [
        "<bos>",
        "<pad>",
        "<eos>",
        "<user>",
        "<bot>",
        "<mask>",
        *'abcdef{}[]:,."0123456789-',
        "Ġ",
        "ab",
        "ba",
    ]
    pieces += ["abc", '":', '{"', "Ġa", "Ã", "©", "true", "12", "cab", 'a"']
    pieces += [f"<{place}>" for place in range(len(pieces), 64)]
    special: ClassVar = {*range(6), *(place for place, piece in enumerate(pieces) if piece[0] == "<")}
    all_special_ids: ClassVar = sorted(special)
    added_tokens_decoder: ClassVar = {}

    class backend_tokenizer:  # noqa: N801
        decoder = "ByteLevel"

    def __len__(self):
        return 64

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[place] for place in ids]

    def text(self, place):
        return {"Ġ": b" ", "Ġa": b" a", "Ã": b"\xc3", "©": b"\xa9"}.get(self.pieces[place], self.pieces[place].encode())

    def encode(self, text, add_special_tokens=True):
        left, ids = text.encode(), []
        while left:
            fits = [place for place in range(64) if place not in self.special and left.startswith(self.text(place))]
            ids.append(max(fits, key=lambda place: len(self.text(place))))
            left = left[len(self.text(ids[-1])) :]
        return ids

    def decode(self, ids, skip_special_tokens=False):
        kept = [place for place in ids if place not in self.special or not skip_special_tokens]
        return b"".join(map(self.text, kept)).decode(errors="replace")


LETTERS = Letters()


def expressions(letters="ab"):
    """Regular expressions over a few letters."""
    leaves = st.sampled_from([*letters, ".", f"[{letters}]", f"[^{letters[0]}]", "é", "", r"\w", r"\d?"])

    def more(inner):
        pair = st.tuples(inner, inner)
        some = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?"])
        return st.one_of(
            pair.map(lambda two: f"(?:{two[0]}|{two[1]})"),
            pair.map("".join),
            st.tuples(inner, some).map(lambda one: f"(?:{one[0]}){one[1]}"),
        )

    return st.recursive(leaves, more, max_leaves=8)


def accepts(automaton, text):
    state = automaton.start
    for byte in text:
        state = automaton.next_SB[state, byte]
        if state < 0:
            return False
    return bool(automaton.final_S[state])


@given(expressions())
@hypothesis_settings(max_examples=150, deadline=None)
def test_the_automaton_of_bytes_takes_what_the_expression_matches(regex):
    automaton = byte_automaton(regex)
    for length in range(5):
        for letters in itertools.product("abé\n", repeat=length):
            text = "".join(letters)
            assert accepts(automaton, text.encode()) == bool(re.fullmatch(regex, text, re.ASCII)), text


@given(st.lists(st.integers(0, 0x10FFFF), min_size=2, max_size=4), st.lists(st.integers(0, 0x10FFFF), max_size=20))
def test_ranges_of_characters_are_ranges_of_utf8(ends, others):
    ends = sorted(end for end in ends if not 0xD800 <= end < 0xE000)
    assume(len(ends) >= 2)
    pairs = [*itertools.pairwise(ends)][::2]
    automaton = byte_automaton("[" + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in pairs) + "]")
    near = [end + by for end in ends for by in (-1, 0, 1)]
    for point in {*near, *others, *range(0x7D, 0x82), *range(0x7FE, 0x802), 0xFFFF, 0x10000}:
        if 0 <= point <= 0x10FFFF and not 0xD800 <= point < 0xE000:
            inside = any(a <= point <= b for a, b in pairs)
            assert accepts(automaton, chr(point).encode()) == inside, hex(point)


def test_the_automaton_is_the_smallest():
    assert len(byte_automaton("(?:a|b)*a(?:a|b){4}").final_S) == 32
    assert len(byte_automaton("(?:ab|cb|db)*").final_S) == 2
    assert len(byte_automaton("a{0}b").final_S) == 2


@pytest.mark.parametrize(
    ("regex", "words"),
    [
        ("[", "is no regular expression: unterminated character set"),
        ("a\ud800", "is no regular expression"),
        ("a(?=b)", "lookahead and lookbehind are not supported"),
        (r"(a)\1", "references to groups are not supported"),
        (r"\bfoo\b", "^, $ and \\b anywhere but"),
        ("a|^b", "^, $ and \\b anywhere but"),
        ("(?i)a", "leave out (?i)"),
        ("(?i:a)", "flags inside an expression are not supported"),
        ("(?>a)", "atomic groups are not supported"),
        (r"[^\s\S]", "matches nothing"),
        ("(a|b)*a(a|b){30}", "needs too large an automaton"),
        ("((a{1,100}){1,100}){1,100}", "needs too large an automaton"),
        ("(a?){20000}", "needs too large an automaton"),
        ("(" * 3000 + ")" * 3000, "nested too deeply|is no regular expression"),
    ],
)
def test_expressions_that_are_refused(regex, words):
    with pytest.raises(IlladaError, match=words if "|" in words else re.escape(words)):
        byte_automaton(regex)


def test_anchors_around_an_expression_say_nothing_new():
    assert accepts(byte_automaton("^abc$"), b"abc")
    assert not accepts(byte_automaton(r"\Aabc\Z"), b"abc\n")


@given(expressions(), st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=5))
@hypothesis_settings(deadline=None)
def test_the_automaton_of_tokens_takes_what_their_texts_match(regex, texts):
    whole = [one.encode() for one in texts]
    vocabulary = [None, *whole, *(part for one in whole for part in (one[:1], one[1:]) if part), b""]
    try:
        automaton = token_automaton(byte_automaton(regex), Tree.of(vocabulary), (0,), "it")
    except IlladaError:
        automaton = None
    shortest = UNREACHABLE
    for length in range(4):
        for ids in itertools.product(range(1, len(vocabulary) - 1), repeat=length):
            text = b"".join(vocabulary[place] for place in ids)
            try:
                matches = bool(re.fullmatch(regex, text.decode(), re.ASCII))
            except UnicodeDecodeError:
                matches = False
            if matches:
                shortest = min(shortest, length)
            if automaton is not None and length < 3:
                assert walks(automaton, ids) == matches
    if automaton is None:
        assert shortest == UNREACHABLE
    elif shortest < UNREACHABLE or automaton.distance_S[automaton.start] < 4:
        assert automaton.distance_S[automaton.start] == shortest


def walks(automaton, ids):
    try:
        return bool(automaton.final_S[automaton.walk(automaton.start, ids)])
    except IndexError:
        return False


# The choice

FOUR = [b"a", b"b", b"c", None]


def small_form(regex, texts=FOUR):
    return TokenForm((TokenPath(token_automaton(byte_automaton(regex), Tree.of(texts), (3,), "it"), lambda text: []),))


def a_row(form, decided, **settings):
    block = len(decided)
    chosen = GenerationSettings(max_new_tokens=block, block_length=block, eos_token_id=3, **settings)
    row = Request(np.zeros(0, dtype=np.int64), block, chosen, form=form, state=form.paths[0].automaton.start)
    row.masked_G[:] = [one is None for one in decided]
    row.ids_G[:] = [one or 0 for one in decided]
    return row


def matcher(regex, texts=FOUR):
    return lambda ids: (
        None not in [texts[i] for i in ids] and bool(re.fullmatch(regex, b"".join(texts[i] for i in ids).decode()))
    )


@given(expressions("abc"), st.integers(1, 6), st.integers(0, 2**31), st.data())
@hypothesis_settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_the_choice_is_the_best_of_all_valid_fillings(regex, length, seed, data):
    try:
        form = small_form(regex)
    except IlladaError:
        assume(False)
    logits = np.random.default_rng(seed).normal(0, 3, (length, 4))
    matches = matcher(regex)
    valid = [*reference_fillings(logits.tolist(), [None] * length, matches, 3)]
    assume(valid)
    some, _ = data.draw(st.sampled_from(valid))
    decided = [one if data.draw(st.booleans()) else None for one in some]
    valid = [*reference_fillings(logits.tolist(), decided, matches, 3)]
    row = a_row(form, decided)
    if not row.masked_G.any():
        return
    own = torch.from_numpy(logits[row.masked_G])
    found = row.ids_G.copy()
    found[row.masked_G] = form.choose(row, own, own, 0.0).numpy()
    best = max(valid, key=lambda one: one[1])
    assert matches([*found][: [*found].index(3)] if 3 in found else [*found])
    assert logits[row.masked_G, found[row.masked_G]].sum() == pytest.approx(best[1])
    # What is decided without a pass is what all valid fillings share.
    form.settle(row)
    now = np.flatnonzero(~row.masked_G)
    assert all(len({ids[place] for ids, _ in valid}) == 1 for place in now if decided[place] is None)
    left = [*reference_fillings(logits.tolist(), [*np.where(row.masked_G, None, row.ids_G)], matches, 3)]
    assert len(left) == len(valid)


@pytest.mark.parametrize("regex", ["c|b", "[bc]a", "(?:ab|ba|ca){2}", "ac|ba|cb", "[abc]*"])
def test_of_equal_scores_the_first_id_is_taken(regex):
    texts, length = [*FOUR[2::-1], None], 4  # in another order than their bytes
    form = small_form(regex, texts)
    logits = torch.zeros(length, 4)
    valid = reference_fillings(logits.tolist(), [None] * length, matcher(regex, texts), 3)
    found = form.choose(a_row(form, [None] * length), logits, logits, 0.0)
    assert tuple(found.tolist()) == min(ids for ids, _ in valid)


@pytest.mark.parametrize("steps", [1, 4])
def test_classes_are_read_as_their_ids(steps):
    """Also where ids are cut, or excluded; classes that no edge has are none."""
    (form,) = small_form("ab*|b*c").paths
    automaton = form.automaton
    edges = automaton.around(automaton.start, steps)
    weight = np.random.default_rng(0).normal(0, 5, (4, 4)).astype(np.float32)
    weight[1, :2], weight[2, 2], weight[3, 1:3] = weight[1, :2] - 1e6, -np.inf, (-1e6, -np.inf)
    choice = weight[::-1].astype(np.float64)
    score, best = form.by_class(edges, weight, choice, True)
    assert np.array_equal(form.by_class(edges, weight, choice, False), (best, best))
    for number in range(automaton.nothing + 1):
        ids = np.flatnonzero(automaton.class_V == number)
        if number == automaton.anything:
            ids = np.arange(4)
        elif number == automaton.nothing or number not in edges.class_E:
            ids = ids[:0]
        least = np.full((4, 1), -np.inf)
        assert np.array_equal(best[:, number], np.hstack((choice[:, ids], least)).max(1))
        assert score[:, number] == pytest.approx(special.logsumexp(np.hstack((weight[:, ids], least)), axis=1))


@pytest.mark.parametrize(("regex", "decided"), [("a*b?c*", [None] * 4), ("(ab|c)*", [None, None, 1, None])])
def test_draws_follow_the_distribution_of_valid_fillings(regex, decided):
    form, matches, temperature, draws = small_form(regex), matcher(regex), 0.7, 2000
    logits = np.random.default_rng(1).normal(0, 1, (4, 4))
    scaled = torch.from_numpy(logits / temperature).log_softmax(-1)
    valid = [*reference_fillings(scaled.tolist(), decided, matches, 3)]
    weight = np.exp([log_p for _, log_p in valid])
    row = a_row(form, decided, temperature=temperature)
    own = torch.from_numpy(logits[row.masked_G])
    position = torch.from_numpy(np.flatnonzero(row.masked_G))[:, None]
    counts = dict.fromkeys((ids for ids, _ in valid), 0)
    for seed in range(draws):
        noise = rng.uniform(seed, 16, 0, position, torch.arange(4), dtype=torch.float64).log().neg().log()
        found = row.ids_G.copy()
        found[row.masked_G] = form.choose(row, own / temperature, own - temperature * noise, temperature).numpy()
        counts[tuple(found.tolist())] += 1
    expected = draws * weight / weight.sum()
    often = expected >= 5
    seen = np.array([*counts.values()])
    observed = [*seen[often], seen[~often].sum()]
    wanted = [*expected[often], expected[~often].sum()]
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue > 1e-4


# Whole answers

REGEXES = [
    r'\{"a": (?:true|12), "b": \[(?:0|1)(?:, (?:0|1)){0,3}\]\}'.replace(" ", ""),
    r"[abc]{3,9}",
    r"(?:ab|ba)*c?",
    r"é*\d{2}",
    "abc|cab|true",
    r'\{"a":"[a-f ]*"\}',
]
WAYS = [
    {},
    {"threshold": 0.3},
    {"steps_per_block": 2},
    {"remasking": "margin"},
    {"remasking": "random", "steps_per_block": 3},
    {"entropy_bound": 0.5},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 3, "seed": 4},
    {"temperature": 1.0, "top_p": 0.5, "min_p": 0.1},
    {"later_masks": True},
    {"guidance_scale": 0.7},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"speculate": 2},
    {"speculate": 2, "threshold": 0.2},
    {"cache": "prefix"},
    {"cache": "frozen", "threshold": 0.4},
    {"cache": "adaptive", "refresh_below": 0.4},
    {"cache": "frozen", "speculate": 3},
    {"cache": "dual", "later_masks": True, "speculate": 2},
]


def settings(regex=None, block=4, budget=24, **more):
    return GenerationSettings(max_new_tokens=budget, block_length=block, regex=regex, **more)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_answer_matches_in_any_company(tied, way):
    """Rows with and without forms share passes; each answer is the one that its prompt gets alone."""
    prompts = [[7, 8, 9 + place] for place in range(len(REGEXES))]
    blocks = [3, 4, 6, 8, 12, 24]
    every = [settings(regex, block, **way) for regex, block in zip(REGEXES, blocks, strict=True)]
    if "steps_per_block" in way:
        every = [settings(regex, 6, **way) for regex in REGEXES]
    free = [settings(None, 6, **way)] * 2
    together = generate(tied, [*prompts, [7, 8], [9]], [*every, *free], LETTERS)
    for prompt, own, answer in zip(prompts, every, together, strict=False):
        assert re.fullmatch(own.regex, answer.text, re.ASCII), answer.text
        assert generate(tied, [prompt], own, LETTERS) == [answer]
    assert together[-2:] == generate(tied, [[7, 8], [9]], free, LETTERS)


@given(expressions("abc"), st.sampled_from(WAYS), st.integers(1, 8), st.integers(0, 63), st.integers(0, 9))
@hypothesis_settings(max_examples=40, deadline=None)
def test_any_expression_in_any_way(untied, regex, way, block, first, seed):
    way = {name: min(value, block) if name == "steps_per_block" else value for name, value in way.items()}
    way = {"seed": seed, **way}
    own = settings(regex, block, 16, eos_token_id=1, **way)
    try:
        [answer] = generate(untied, [[first, 8]], own, LETTERS)
    except IlladaError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "the shortest text that matches" in said or "no tokens of this vocabulary" in said
        return
    assert re.fullmatch(regex, answer.text, re.ASCII)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_form_that_takes_everything_changes_nothing(tied, way):
    """Special tokens are no text, and so must be left out by a bias; bytes that are no text must not be there."""
    special = dict.fromkeys([place for place in Letters.special if place not in (END, MASK)], -1e4)
    special |= dict.fromkeys([Letters.pieces.index("Ã"), Letters.pieces.index("©")], -1e4)
    own = settings("(?s).*", 6, logit_bias=special, **way)
    free = settings(None, 6, logit_bias=special, **way)
    prompts = [[7, 8], [9, 40, 12], [30]]
    assert generate(tied, prompts, own, LETTERS) == generate(tied, prompts, free, LETTERS)


@pytest.mark.parametrize("regex", REGEXES)
def test_speculation_and_drafts_change_nothing(tied, regex):
    plain, ahead = (generate(tied, [[7, 9]], settings(regex, 6, speculate=n), LETTERS)[0] for n in (0, 3))
    assert plain.ids == ahead.ids
    assert ahead.forwards <= plain.forwards


@pytest.mark.parametrize("block", [3, 5, 12, 24])
@pytest.mark.slow
def test_drafts_stop_where_fixed_text_is_written_otherwise(untied, block):
    """The last pass proposed other tokens for the text that the form then decides by itself."""
    regex = r'\{"abc":(?:true|12|a{1,3}),"bad":(?:[a-f]{1,4}|"[ab]*"),"cab":\[\d{1,2}\]\}'
    for first, way in itertools.product(range(7, 12), [{}, {"threshold": 0.3}, {"cache": "frozen"}]):
        own = {"block": block, "budget": 48, "eos_token_id": 1, **way}
        plain, ahead = (generate(untied, [[first, 9]], settings(regex, speculate=n, **own), LETTERS)[0] for n in (0, 4))
        assert plain.ids == ahead.ids
        assert re.fullmatch(regex, plain.text)


def test_fixed_text_costs_no_pass(tied):
    fixed = '\\{"abc":\\[12,(?:0|1)\\]\\}'
    [answer] = generate(tied, [[7]], settings(fixed, 24, 24), LETTERS)
    assert answer.text in ('{"abc":[12,0]}', '{"abc":[12,1]}')
    assert answer.forced >= 9
    assert answer.log_probs.count(0.0) >= 7
    [given] = generate(tied, [[7]], settings("abcabc", 4, 24), LETTERS)
    assert (given.text, given.forwards) == ("abcabc", 1)
    [full] = generate(tied, [[7]], settings("abcabc", 6, 6, eos_token_id=None), LETTERS)
    assert (full.text, full.forwards, full.forced) == ("abcabc", 1, 5)  # a pass has to decide something


@pytest.mark.parametrize("regex", ["abcdefabcdef[ab]{2}(?:fedcba){4}", "abcabc", "(?:abc|bcd|12cab|dad|cab){4,9}"])
@pytest.mark.parametrize("first", [7, 8, 9])
def test_steps_say_what_the_form_gave(untied, regex, first):
    """Also where blocks before the first pass, or behind the last one, need none, and where drafts run ahead."""

    def told(**way):
        events = []
        [answer] = generate(untied, [[first, 9]], settings(regex, 8, 48, eos_token_id=1, **way), LETTERS, events.append)
        assert events[-1].done
        assert events[-1].ids[: len(answer.ids)] == answer.ids
        assert sum(events[-1].forced) == answer.forced
        return answer, events

    answer, events = told()
    for passes, event in enumerate(events, 1):
        of_form = np.array(event.forced)
        assert np.array(event.committed)[of_form].all()
        assert (np.array(event.confidence)[of_form] == 1).all()
        assert sum(event.committed) - of_form.sum() == passes  # each pass decides one token
    assert answer.forwards == len(events)
    assert [event.forced for event in told(speculate=3)[1]] == [event.forced for event in events]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "frozen", "adaptive"])
def test_blocks_without_a_pass_leave_the_caches_whole(tied, cache, monkeypatch):
    """Blocks of fixed text are skipped; the next pass computes them all, and reads nothing that was not written."""
    begin, passes, steps = KVCache.begin, [], []
    monkeypatch.setattr(KVCache, "begin", lambda self, *span: passes.append(span) or begin(self, *span))
    way = settings("[ab]" + "abcdef" * 3 + "[ab]{4}", 3, 30, cache=cache, later_masks=cache == "dual")
    [answer] = generate(tied, [[7, 8]], way, LETTERS, on_step=steps.append)
    assert re.fullmatch("[ab](?:abcdef){3}[ab]{4}", answer.text)
    assert answer.forced >= 9
    if cache == "dual":  # all is written from the start, and old where it was masked then
        assert [start for start, _ in passes] == [2 + step.block if step.step else 0 for step in steps]
    written = 0
    for start, seen in passes:
        assert start <= written
        written = seen


def test_a_causal_model_is_led_too(build_model):
    causal = build_model(tie=True, seed=3, causal=True)
    for regex in REGEXES:
        own = GenerationSettings(max_new_tokens=24, regex=regex)
        assert re.fullmatch(regex, generate(causal, [[7, 8]], own, LETTERS)[0].text, re.ASCII)


def test_each_slot_matches(tied):
    template = [7, None, None, None, 8, 9, None, None]
    for regex, way in itertools.product(["[ab]{2,5}", "abcd|bad|ab|b{2,3}", r"\d+"], [{}, {"temperature": 1.0}]):
        [answer] = infill(tied, [template], settings(regex, **way), LETTERS)
        for first, last in ((1, 4), (6, 8)):
            assert re.fullmatch(regex, LETTERS.decode(answer.ids[first:last]))


def test_each_slot_matches_its_own(tied):
    template = [7, None, None, None, 8, 9, None, None]
    for way in ({}, {"temperature": 1.0, "seed": 3}, {"threshold": 0.3}):
        own = settings(slot_regex=["[ab]{2,3}", r"\d+"], **way)
        [answer] = infill(tied, [template], own, LETTERS)
        assert re.fullmatch("[ab]{2,3}", LETTERS.decode(answer.ids[1:4]))
        assert re.fullmatch(r"\d+", LETTERS.decode(answer.ids[6:8]))
    for regexes, slots in ((["a"], "1 expressions, the text 2 slots"), (["a"] * 3, "3 expressions")):
        with pytest.raises(IlladaError, match=slots):
            infill(tied, [template], settings(slot_regex=regexes), LETTERS)
    with pytest.raises(IlladaError, match="the text 0 slots"):
        generate(tied, [[7, 8]], settings(slot_regex=["a"]), LETTERS)
    with pytest.raises(IlladaError, match="slot_regex must be a list of texts"):
        settings(slot_regex="ab")
    with pytest.raises(IlladaError, match="regex and slot_regex cannot"):
        settings("a", slot_regex=["a"])


@pytest.mark.parametrize("ending", [None, (2, 8), (2, 6), 60])
def test_ids_that_end_an_answer(tied, ending):
    """Without any the text must fill the answer; one that is a text elsewhere (8: c, 6: a) is none of the answer."""
    for regex in ("[ab]{3,30}", "[ab]{2,9}d*c?", "c?(?:ab|b)+"):
        own = settings(regex, 4, 16, eos_token_id=ending)
        [answer] = generate(tied, [[7, 9]], own, LETTERS)
        assert re.fullmatch(regex, answer.text)
        assert ending is not None or len(answer.ids) == 16
    if ending is None:
        with pytest.raises(IlladaError, match="no text that matches regex has exactly 16 tokens"):
            generate(tied, [[7, 9]], settings("[ab]{3}", 4, 16, eos_token_id=None), LETTERS)


@pytest.mark.slow
def test_forms_that_cost_too_much_are_refused(tied, monkeypatch):
    many = "[" + "".join(f"\\x{a:02x}-\\x{b:02x}" for a in range(1, 127) for b in range(a, 128)) + "]"
    with pytest.raises(IlladaError, match="needs too large an automaton"):
        byte_automaton(many + "{5000}")
    monkeypatch.setattr(forms, "MOST_STEPS", 1000)
    with pytest.raises(IlladaError, match="too large for blocks of this length"):
        generate(tied, [[7]], settings("(?s).*[a-f0-9 ].{3}[a-m]", 80, 80, eos_token_id=1), LETTERS)
    assert len(byte_automaton("a{0,3000}x").final_S) == 3002
    assert len(byte_automaton("(?:a|b){0,400}").final_S) == 401


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"choices": "yes"}, "choices must be a list of texts"),
        ({"choices": [1]}, "choices must be a list of texts"),
        ({"regex": 5}, "regex must be a text"),
    ],
)
def test_values_of_another_type(values, words):
    with pytest.raises(IlladaError, match=words):
        settings(**values)


def test_choices_and_what_cannot_be(tied):
    [answer] = generate(tied, [[7]], settings(choices=("a.c", "ab", "d"), block=4), LETTERS)
    assert answer.text in ("a.c", "ab", "d")
    with pytest.raises(IlladaError, match="the shortest text that matches regex has 38 tokens, the answer at most 24"):
        generate(tied, [[7]], settings("[ab]{75}", 4), LETTERS)
    with pytest.raises(IlladaError, match="no tokens of this vocabulary make such an answer"):
        generate(tied, [[7]], settings("Z"), LETTERS)
    with pytest.raises(IlladaError, match="regex needs a tokenizer"):
        generate(tied, [[7]], settings("a"))
    with pytest.raises(IlladaError, match="regex and choices cannot be used together"):
        settings("a", choices=("b",))
    with pytest.raises(IlladaError, match="regex and stop cannot be used together"):
        settings("a", stop=("b",))
    with pytest.raises(IlladaError, match="at most 200,000 are taken"):
        generate(tied, [[7]], settings("a" * 200_001), LETTERS)

    class Sentences(Letters):
        class backend_tokenizer:  # noqa: N801
            decoder = "Metaspace"

    with pytest.raises(IlladaError, match="need a byte-level tokenizer"):
        generate(tied, [[7]], settings("a"), Sentences())


def test_a_form_is_made_once(tied, monkeypatch):
    made = []
    monkeypatch.setattr(forms, "byte_automaton", lambda *key: made.append(key) or byte_automaton(*key))
    for _ in range(3):
        request = Request.of_prompt(tied.config, [7], settings("(?:ab)+cc"), "it")
        give_form(request, LETTERS, 64, "it")
    assert len(made) == 1


def test_forms_are_kept_as_far_as_the_bytes_go(tied, monkeypatch):
    made = []
    monkeypatch.setattr(forms, "byte_automaton", lambda regex, kind: made.append(regex) or byte_automaton(regex, kind))
    tokenizer = Letters()

    def ask(regex):
        request = Request.of_prompt(tied.config, [7], settings(regex), "it")
        give_form(request, tokenizer, 64, "it")
        return forms._size(request.form.paths[0].automaton)

    sizes = [ask(regex) for regex in ("a[ab]{6}", "b[ab]{6}", "c[ab]{6}")]
    assert min(sizes) > 16 * 256  # bytes of the rows of a table alone
    ask("a[ab]{6}")
    assert made == ["a[ab]{6}", "b[ab]{6}", "c[ab]{6}"]
    # The next one takes the place of the two that were asked for longest ago.
    monkeypatch.setattr(forms, "MOST_BYTES", 2 * max(sizes) + 100)
    ask("d[ab]{6}")
    for regex in ("a[ab]{6}", "d[ab]{6}", "b[ab]{6}"):
        ask(regex)
    assert made[3:] == ["d[ab]{6}", "b[ab]{6}"]
    # One that is larger than all of them is given all the same, and what it keeps of its own counts.
    monkeypatch.setattr(forms, "MOST_BYTES", 0)
    assert ask("e[ab]{6}") > 0
    ask("e[ab]{6}")
    assert made[5:] == ["e[ab]{6}"]
