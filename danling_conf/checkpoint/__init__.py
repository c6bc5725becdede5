"""Saving and loading: the manager, its backends, and the full state of wrapped models."""
