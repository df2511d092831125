"""Checkpoint folders: finding one, its config, reading and writing its tensors."""
