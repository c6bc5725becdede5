"""Topology of a run: degrees, axes, ranks, resources, and the rules that decide whether it can run. Pure Python."""
