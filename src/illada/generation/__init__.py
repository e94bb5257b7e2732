"""Generation: variable-length and fixed-length decoding of many requests at once (spec §5)."""

from typing import TYPE_CHECKING, Any

from illada.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from illada.generation.engine import Engine, Generation, StepEvent, generate, infill

__all__ = ["Engine", "Generation", "GenerationSettings", "StepEvent", "generate", "infill"]


def __getattr__(name: str) -> Any:
    # The command line reads the settings for --help; torch is loaded only by whoever generates.
    if name in __all__:
        from illada.generation import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
