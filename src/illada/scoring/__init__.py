"""Scoring of candidate answers: confidence (paper Eq. 2) and Monte-Carlo likelihood (LLaDA Eq. 6)."""

from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import score_layout
from illada.scoring.likelihood import likelihood_scores

__all__ = ["confidence_scores", "likelihood_scores", "score_layout"]
