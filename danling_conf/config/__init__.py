"""From a command line to a checked, read-only configuration with an identity."""
