"""Sweeps: pre-flight, submission, monitor and tables of many runs."""
