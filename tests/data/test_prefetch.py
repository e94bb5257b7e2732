import threading

import pytest

from illada.data.prefetch import Prefetch


def items(step):
    return [(step, n) for n in range(step % 4)]


def test_steps_come_in_order_and_others_begin_anew():
    with Prefetch(items) as prefetch:
        for step in (0, 1, 2, 3, 4, 5, 2, 3, 9):
            assert list(prefetch(step)) == items(step)


def test_the_next_step_is_made_meanwhile_and_no_other():
    made = []
    complete = threading.Event()

    def make(step):
        for n in range(2):
            made.append((step, n))
            yield step, n
        if step == 1:
            complete.set()

    with Prefetch(make) as prefetch:
        assert list(prefetch(0)) == [(0, 0), (0, 1)]
        assert complete.wait(10)
        assert made == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert list(prefetch(1)) == [(1, 0), (1, 1)]


def test_one_thread_works_and_it_ends():
    before = threading.active_count()
    threads = set()

    def make(step):
        threads.add(threading.get_ident())
        return [step]

    with Prefetch(make) as prefetch:
        assert [list(prefetch(step)) for step in range(5)] == [[n] for n in range(5)]
        assert threading.active_count() == before + 1
    assert threads.isdisjoint({threading.get_ident()})
    assert len(threads) == 1
    assert threading.active_count() == before


def test_an_error_comes_to_whoever_needs_the_step():
    def make(step):
        yield step
        if step == 1:
            raise KeyError("no more")

    with Prefetch(make) as prefetch:
        assert list(prefetch(0)) == [0]
        for _ in range(2):
            with pytest.raises(KeyError, match="no more"):
                prefetch(1)
        assert list(prefetch(0)) == [0]


def test_a_step_left_in_the_middle_is_begun_anew():
    with Prefetch(items) as prefetch:
        assert next(iter(prefetch(3))) == (3, 0)
        assert list(prefetch(3)) == items(3)
