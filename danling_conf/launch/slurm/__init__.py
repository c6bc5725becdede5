"""Slurm: what its commands say, jobs submitted through submitit, and what a rank does under it."""
