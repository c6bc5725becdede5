"""Where time passes: the loop, evaluation, score, seeds, progress."""
