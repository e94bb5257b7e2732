"""One trainer for pre-training and SFT."""

from illada.training.recipe import SFT_DEFAULTS, Recipe
from illada.training.trainer import DivergedError, Result, train

__all__ = ["SFT_DEFAULTS", "DivergedError", "Recipe", "Result", "train"]
