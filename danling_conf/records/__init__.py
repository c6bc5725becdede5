"""Records: the files that runs and sweeps leave on disk. One module reads and writes each of them."""
