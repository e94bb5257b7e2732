"""Imports that wait until a name is first used, so that help and usage errors come at once.

torch and transformers take seconds to import. Static tools see ordinary import statements.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType


class _LazyFinder:
    """Finds modules of this package; what each contains is executed at the first access to an attribute."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith("illada.") else None
        if spec is not None and spec.loader is not None and spec.submodule_search_locations is None:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextmanager
def lazily() -> Iterator[None]:
    """Make imports of this package's modules lazy; write them as `import illada.room.module as module`.

        with lazily():
            import illada.generation.engine as engine
    """
    sys.meta_path.insert(0, _LazyFinder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(_LazyFinder)  # type: ignore[arg-type]
