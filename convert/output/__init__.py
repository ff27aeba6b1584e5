"""The files of a checkpoint or of an export on their way to the disk."""
