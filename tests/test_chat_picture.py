"""The picture of an answer that is forming, as `illada chat` draws it."""

from illada.commands.terminal import MASK_SIGN, draw
from illada.generation.engine import StepEvent


class Letters:
    """A tokenizer whose ids are letters; 0 is special."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join("" if i == 0 and skip_special_tokens else chr(96 + i) for i in ids)


def event(ids, committed, confidence):
    return StepEvent(0, 0, 0, ids, committed, confidence, False)


def test_committed_proposed_and_unknown_look_different():
    picture = draw(Letters(), event([1, 2, 3], [True, False, False], [0.9, 0.5, float("nan")]), eos_ids=())
    assert picture.plain == "ab" + MASK_SIGN
    assert [str(span.style) for span in picture.spans] == ["bold", "dim", "dim"]


def test_the_picture_ends_at_a_committed_end():
    drawn = draw(Letters(), event([1, 0, 3], [True, True, True], [1.0] * 3), eos_ids=(0,))
    assert drawn.plain == "a"
    proposed = draw(Letters(), event([1, 0, 3], [True, False, True], [1.0] * 3), eos_ids=(0,))
    assert proposed.plain == "a" + MASK_SIGN + "c"
