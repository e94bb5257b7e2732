"""Scoring of candidate answers (spec §6): confidence (paper Eq. 2), likelihood (LLaDA Eq. 6), path (exact, DUEL)."""
