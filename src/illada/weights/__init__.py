"""Models on disk: find, load, save, adapt, quantise, convert."""
