"""Checkpoints handed over to the engines that people run."""
