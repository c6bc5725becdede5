"""From a composed configuration to a checked, read-only one with an identity and a run directory."""
