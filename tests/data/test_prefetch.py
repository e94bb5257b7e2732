import threading

import pytest

from illada.data.prefetch import Prefetch


def items(step):
    return [(step, n) for n in range(step % 4)]


def test_steps_come_in_order_and_others_begin_anew():
    with Prefetch(items, items=2) as ahead:
        for step in (0, 1, 2, 3, 4, 5, 2, 3, 9):
            assert list(ahead(step)) == items(step)


def test_work_goes_on_ahead_as_far_as_there_is_room():
    made = []
    full = threading.Event()

    def make(step):
        for n in range(2):
            made.append((step, n))
            if len(made) == 5:
                full.set()
            yield step, n

    with Prefetch(make, items=3) as ahead:
        assert list(ahead(0)) == [(0, 0), (0, 1)]
        # Ready: two items of step 1 and its end; the next is made and waits for room.
        assert full.wait(10)
        assert made == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
        assert list(ahead(1)) == [(1, 0), (1, 1)]


def test_one_thread_works_and_it_ends():
    before = threading.active_count()
    threads = set()

    def make(step):
        threads.add(threading.get_ident())
        return [step]

    with Prefetch(make) as ahead:
        assert [list(ahead(step)) for step in range(5)] == [[n] for n in range(5)]
        assert threading.active_count() == before + 1
    assert threads.isdisjoint({threading.get_ident()})
    assert len(threads) == 1
    assert threading.active_count() == before


def test_an_error_comes_to_whoever_needs_the_item():
    def make(step):
        yield step
        if step == 1:
            raise KeyError("no more")

    with Prefetch(make) as ahead:
        assert list(ahead(0)) == [0]
        second = ahead(1)
        assert next(second) == 1
        with pytest.raises(KeyError, match="no more"):
            next(second)
        assert list(ahead(0)) == [0]


def test_a_step_left_in_the_middle_is_begun_anew():
    with Prefetch(items) as ahead:
        assert next(ahead(3)) == (3, 0)
        assert list(ahead(3)) == items(3)


def test_waiting_is_counted_from_the_second_step_on(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("illada.data.prefetch.time.perf_counter", lambda: next(clock))
    with Prefetch(items) as ahead:
        list(ahead(3))
        assert ahead.waited == 0
        list(ahead(4))
        assert ahead.waited == 1
        list(ahead(5))
        assert ahead.waited == 3
