"""The files of a checkpoint on their way to the disk."""
