"""Many runs: pre-flight, submission, monitor, tables."""
