"""Checkpoints: the manager that saves, the loader, their files, and the whole state of wrapped models."""
