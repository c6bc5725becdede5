"""The `danling-conf` command."""
