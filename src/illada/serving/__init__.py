"""Serving: an OpenAI-compatible API and a page, on the engine that batches requests of any kind and length."""
