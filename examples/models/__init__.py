"""Models of the examples: plain torch modules, independent of how they are trained."""
