"""Measurements of this package on any model: what each way to generate costs, and what it is worth."""
