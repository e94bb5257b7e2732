"""What the commands run. A module here is imported when a command first uses it.

torch and transformers take seconds to import; help and usage errors must not wait for them. (The standard library's
LazyLoader will not do: torch walks through `sys.modules` while it is imported, which would load every lazy module.)
"""

# mypy: implicit-reexport

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import illada.bench.generation as bench_generation
    import illada.bench.serving as bench_serving
    import illada.commands.checkup as checkup
    import illada.commands.terminal as terminal
    import illada.demo.stages as demo
    import illada.evaluation.compare as comparison
    import illada.evaluation.run as evaluation
    import illada.generation.engine as generation
    import illada.generation.optional.picture as picture
    import illada.generation.optional.tool_calls as tool_calls
    import illada.post_training.distillation as distillation
    import illada.post_training.preferences as preferences
    import illada.post_training.reinforcement as reinforcement
    import illada.post_training.rollouts as rollouts
    import illada.post_training.work as work
    import illada.preparation.prepare as preparation
    import illada.preparation.train_tokenizer as train_tokenizer
    import illada.scoring.optional.candidates as scoring
    import illada.serving.batch as batch
    import illada.serving.cluster as cluster
    import illada.serving.server as server
    import illada.text.chat as chat
    import illada.training.optional.estimate as estimation
    import illada.training.optional.likelihood as likelihood
    import illada.training.optional.plots as plots
    import illada.training.trainer as training
    import illada.weights.convert as convert
    import illada.weights.export as export
    import illada.weights.gguf as gguf
    import illada.weights.load as weights
    import illada.weights.runs as runs
    import illada.weights.verify as verification

MODULES = {
    "batch": "illada.serving.batch",
    "bench_generation": "illada.bench.generation",
    "bench_serving": "illada.bench.serving",
    "chat": "illada.text.chat",
    "checkup": "illada.commands.checkup",
    "cluster": "illada.serving.cluster",
    "comparison": "illada.evaluation.compare",
    "convert": "illada.weights.convert",
    "demo": "illada.demo.stages",
    "distillation": "illada.post_training.distillation",
    "estimation": "illada.training.optional.estimate",
    "evaluation": "illada.evaluation.run",
    "export": "illada.weights.export",
    "generation": "illada.generation.engine",
    "gguf": "illada.weights.gguf",
    "likelihood": "illada.training.optional.likelihood",
    "picture": "illada.generation.optional.picture",
    "plots": "illada.training.optional.plots",
    "preferences": "illada.post_training.preferences",
    "preparation": "illada.preparation.prepare",
    "reinforcement": "illada.post_training.reinforcement",
    "rollouts": "illada.post_training.rollouts",
    "runs": "illada.weights.runs",
    "scoring": "illada.scoring.optional.candidates",
    "server": "illada.serving.server",
    "terminal": "illada.commands.terminal",
    "train_tokenizer": "illada.preparation.train_tokenizer",
    "tool_calls": "illada.generation.optional.tool_calls",
    "training": "illada.training.trainer",
    "verification": "illada.weights.verify",
    "weights": "illada.weights.load",
    "work": "illada.post_training.work",
}


def __getattr__(name: str) -> Any:
    """Import a module."""
    if name not in MODULES:
        raise AttributeError(name)
    return import_module(MODULES[name])
