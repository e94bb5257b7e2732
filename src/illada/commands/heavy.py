"""What the commands run. Each module here is loaded when a command first uses it.

torch and transformers take seconds to import; help and usage errors must not wait for them. Static tools see ordinary
imports. Lazy modules are imported only here: a second import statement would load them.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType


class _LazyFinder:
    """Finds modules of this package; the first access to an attribute of such a module executes it."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith("illada.") else None
        if spec is not None and spec.loader is not None and spec.submodule_search_locations is None:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextmanager
def _lazily() -> Iterator[None]:
    sys.meta_path.insert(0, _LazyFinder)
    try:
        yield
    finally:
        sys.meta_path.remove(_LazyFinder)


with _lazily():
    import illada.bench.generation as bench_generation
    import illada.bench.serving as bench_serving
    import illada.demo.stages as demo
    import illada.evaluation.compare as comparison
    import illada.evaluation.run as evaluation
    import illada.generation.engine as generation
    import illada.preparation.prepare as preparation
    import illada.scoring.candidates as scoring
    import illada.training.optional.estimate as estimation
    import illada.training.trainer as training
    import illada.weights.load as weights
    from illada import hub
    from illada.commands import terminal
    from illada.preparation import train_tokenizer
    from illada.serving import cluster, server
    from illada.text import chat
    from illada.training import plots
    from illada.weights import convert, export

__all__ = [
    "bench_generation", "bench_serving", "chat", "cluster", "comparison", "convert", "demo", "estimation", "evaluation",
    "export", "generation", "hub", "plots", "preparation", "scoring", "server", "terminal", "train_tokenizer",
    "training", "weights",
]  # fmt: skip
