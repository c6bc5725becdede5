"""What is on disk of a run or a sweep: each file's name, reader and writer, once."""
