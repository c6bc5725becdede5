"""Slurm: queries of its commands, a rank of a job, and the requeue of a job."""
