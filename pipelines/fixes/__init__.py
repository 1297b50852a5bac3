"""Stock pipelines with what is missing or wrong in them mended, and nothing else."""
