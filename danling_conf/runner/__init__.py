"""Runner of a training: setup, loop, cadence, score, saving and resuming, and what a person sees of it."""
