"""Requests in, tokens out: who runs when, and what is kept for whom."""
