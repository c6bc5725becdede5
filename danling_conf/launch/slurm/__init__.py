"""Slurm: queries through its commands, one rank of a job, and requeueing."""
