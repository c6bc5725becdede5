"""Models of the examples: plain torch modules that know nothing of how they are trained."""
