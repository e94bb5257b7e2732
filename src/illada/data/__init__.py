"""From raw text to packed training batches."""
