"""Whether it can run: degrees, axes, ranks, resources and rules, in pure Python."""
