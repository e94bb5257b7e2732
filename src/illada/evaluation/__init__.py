"""Evaluation: models in lm-evaluation-harness, the paper's tables, ablations and comparisons (spec §6, §7)."""

from illada.errors import needs

with needs("eval", "evaluation"):
    import lm_eval as _lm_eval  # noqa: F401
