"""Generation: variable-length and fixed-length decoding of many requests at once (spec §5)."""
