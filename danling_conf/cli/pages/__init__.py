"""Self-contained HTML pages: one file each, nothing fetched, readable in light and in dark."""
