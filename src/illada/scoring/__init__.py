"""Scoring of candidate answers: confidence (paper Eq. 2) and Monte-Carlo likelihood (LLaDA Eq. 6), spec §6.

The way of a question through the room: `candidates` takes texts and returns their scores · `layout` turns texts into
pairs of ids and pairs into `Candidate`s · `confidence` and `likelihood` decide which `Query`s to make of each (some
tokens masked, whose probabilities are wanted) and how to add up their answers · `layout.target_log_probs` answers many
queries in packed forward passes.
"""

from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import score_layout
from illada.scoring.likelihood import likelihood_scores

__all__ = ["confidence_scores", "likelihood_scores", "score_layout"]
