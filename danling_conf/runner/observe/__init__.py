"""What watches a run and changes nothing of what it trains."""
