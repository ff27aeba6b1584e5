"""The CPU backend: the reference's arithmetic on torch's fast paths."""
