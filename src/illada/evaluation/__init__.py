"""Evaluation: models in lm-evaluation-harness, the paper's tables, ablations and comparisons (spec §6, §7)."""
