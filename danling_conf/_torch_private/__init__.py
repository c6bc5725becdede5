"""Adapter of torch's private names: nothing else in the package uses one.

All of it was run with torch 2.13, on the CPU (gloo) and, where a note says so, on CUDA. Each note says what breaks when
torch changes the name, and thus what to test with a new version of torch.
"""
