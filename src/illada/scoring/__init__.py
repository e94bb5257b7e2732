"""Scoring of candidate answers: confidence (paper Eq. 2) and Monte-Carlo likelihood (LLaDA Eq. 6), spec §6.

The way of a question through the room:

- `candidates`: a context and its candidates as texts, and their scores in the end.
- `layout`: texts become pairs of ids, pairs become `Candidate`s; a `Query` masks some tokens of one and asks for their
  probabilities, and `target_log_probs` answers many queries in packed forward passes.
- `confidence`, `likelihood`: which queries to make, and how their answers add up to a score.
"""

from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import score_layout
from illada.scoring.likelihood import likelihood_scores

__all__ = ["confidence_scores", "likelihood_scores", "score_layout"]
