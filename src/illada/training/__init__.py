"""Training: one loop for pre-training and fine-tuning, on one process or many (spec §3–4)."""
