"""Answers of a given form, and drafts: what generation can do without."""
