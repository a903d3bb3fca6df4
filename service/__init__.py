"""What a job is and how one process trains it.  Importing this imports nothing else."""
