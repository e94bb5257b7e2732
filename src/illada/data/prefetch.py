"""The batches of the next step, made in a thread while the training takes this one."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """A function from step number to items that makes the items of the next step while those of this one are used.

        with Prefetch(make) as prefetch:
            for step in range(...):
                for item in prefetch(step):
                    ...

    When another step than the next is requested, the items made for nothing are dropped. An error of `make` is raised
    to whoever requests the step. The items of two steps are in memory together: 17 bytes a token for batches, which is
    2 x 180 MB for a process that computes 1280 windows of 8192 tokens alone.

    Attributes:
        waited: seconds for which a requested step was not ready; a step that nobody could have expected, as the first,
            does not count.

    Args:
        make: the items of a step; called in one thread.
    """

    def __init__(self, make: Callable[[int], Iterable[T]]):
        self.waited = 0.0
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._step: int | None = None
        self._items: Future[list[T]] = Future()

    def __call__(self, step: int) -> list[T]:
        """Return the items of a step, and begin to make those of the next."""
        expected = step == self._step
        if not expected:
            self._begin(step)
        self._step = None  # a step that fails is made anew when it is requested again
        started = time.perf_counter()
        items = self._items.result()
        if expected:
            self.waited += time.perf_counter() - started
        self._begin(step + 1)
        return items

    def _begin(self, step: int) -> None:
        self._step, self._items = step, self._thread.submit(lambda: list(self._make(step)))

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread, once the step that it makes is complete."""
        self._thread.shutdown(cancel_futures=True)
