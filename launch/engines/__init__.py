"""What runs a job on machines that are not ours to start."""
