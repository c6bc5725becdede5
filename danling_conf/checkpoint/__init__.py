"""Checkpoints: the manager that saves, the loader, their files, and the state of wrapped models under global names."""
