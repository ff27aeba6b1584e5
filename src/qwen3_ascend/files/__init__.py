"""Bytes, files and threads: what knows nothing of models."""
