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
    import illada.commands.terminal as terminal
    import illada.demo.stages as demo
    import illada.evaluation.compare as comparison
    import illada.evaluation.run as evaluation
    import illada.generation.engine as generation
    import illada.preparation.prepare as preparation
    import illada.preparation.train_tokenizer as train_tokenizer
    import illada.scoring.candidates as scoring
    import illada.serving.cluster as cluster
    import illada.serving.server as server
    import illada.text.chat as chat
    import illada.training.optional.estimate as estimation
    import illada.training.optional.plots as plots
    import illada.training.trainer as training
    import illada.weights.convert as convert
    import illada.weights.export as export
    import illada.weights.load as weights

__all__ = [
    "bench_generation", "bench_serving", "chat", "cluster", "comparison", "convert", "demo", "estimation", "evaluation",
    "export", "generation", "plots", "preparation", "scoring", "server", "terminal", "train_tokenizer",
    "training", "weights",
]  # fmt: skip
