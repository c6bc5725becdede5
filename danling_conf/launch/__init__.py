"""Launch of one run: its processes on this machine, under torchrun or srun, or in a job of Slurm."""
