"""The batches of the next step, made in a thread while the training takes this one."""

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

    Args:
        make: the items of a step; called in one thread.
    """

    def __init__(self, make: Callable[[int], Iterable[T]]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._step: int | None = None
        self._items: Future[list[T]] = Future()

    def __call__(self, step: int) -> list[T]:
        """Return the items of a step, and begin to make those of the next."""
        if step != self._step:
            self._begin(step)
        self._step = None  # a step that fails is made anew when it is requested again
        items = self._items.result()
        self._begin(step + 1)
        return items

    def _begin(self, step: int) -> None:
        self._step, self._items = step, self._thread.submit(lambda: list(self._make(step)))

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread, once the step that it makes is complete."""
        self._thread.shutdown(cancel_futures=True)
