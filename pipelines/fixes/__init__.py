"""Stock pipelines with what is missing or wrong in them fixed, and nothing else."""
