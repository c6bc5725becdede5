"""Self-contained HTML pages: one file each, which loads nothing from elsewhere, in light and dark colours."""
