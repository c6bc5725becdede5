"""Configuration: from a command line to a checked, read-only object with an identity."""
