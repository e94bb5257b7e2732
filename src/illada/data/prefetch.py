"""Batches made ready in a thread beside the training, so that a step finds them waiting."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """A function from step number to items that is a few items ahead of whoever asks for them, across steps.

        with Prefetch(make) as ahead:
            for step in range(...):
                for item in ahead(step):
                    ...

    The steps after the one asked for are taken to be asked for next; when another is, what was made for nothing is
    dropped. One thread calls `make`; what it raises is raised to whoever asks for the item.

    Attributes:
        waited: seconds that items were waited for, the first step asked for not counted (nothing can be ready there).

    Args:
        make: the items of a step.
        items: how many to hold ready; they take memory.
    """

    def __init__(self, make: Callable[[int], Iterable[T]], items: int = 4):
        self.waited = 0.0
        self._make, self._items = make, items
        self._next: int | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def __call__(self, step: int) -> Iterator[T]:
        """Return the items of a step, to be gone through to the end before the next is asked for."""
        first = step != self._next
        if first:
            self.close()
            self._stop, self._ready = threading.Event(), queue.Queue(self._items)
            arguments = (step, self._stop, self._ready)
            self._thread = threading.Thread(target=self._work, args=arguments, name="batches ahead", daemon=True)
            self._thread.start()
        # Known only once the step is through: one that was left in the middle is begun anew.
        self._next = None
        while True:
            started = time.perf_counter()
            kind, content = self._ready.get()
            if not first:
                self.waited += time.perf_counter() - started
            if kind == "end":
                self._next = step + 1
                return
            if kind == "error":
                assert isinstance(content, BaseException)
                raise content
            yield content  # type: ignore[misc]  # an item

    def close(self) -> None:
        """Stop the thread; returns when it has stopped."""
        self._stop.set()
        if self._thread is not None:
            with suppress(queue.Empty):  # it may be waiting for room
                while True:
                    self._ready.get_nowait()
            self._thread.join()
            self._thread = None
        self._next = None

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(
        self, step: int, stop: threading.Event, ready: "queue.Queue[tuple[str, T | BaseException | None]]"
    ) -> None:
        def put(kind: str, content: T | BaseException | None = None) -> bool:
            """Wait for room; returns whether to go on."""
            while not stop.is_set():
                with suppress(queue.Full):
                    ready.put((kind, content), timeout=0.1)
                    return True
            return False

        try:
            while True:
                for item in self._make(step):
                    if not put("item", item):
                        return
                if not put("end"):
                    return
                step += 1
        except BaseException as error:  # whatever it is, the step that needs the item must hear of it
            put("error", error)
