"""Scoring of candidate answers: confidence (paper Eq. 2) and Monte-Carlo likelihood (LLaDA Eq. 6; spec §6)."""
