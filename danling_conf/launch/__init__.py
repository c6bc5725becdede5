"""Where processes start: the command line of an app, local workers, sweeps."""
