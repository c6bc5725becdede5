"""Observers of a run, which change nothing of what it trains."""
