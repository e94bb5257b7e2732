"""Evaluation: models in lm-evaluation-harness, the paper's tables, ablations and comparisons (spec §6, §7)."""

from illada.errors import IlladaError

try:
    import lm_eval as _lm_eval  # noqa: F401
except ImportError as error:
    raise IlladaError("evaluation needs lm-evaluation-harness: pip install 'illada[eval]'") from error
