"""What a run will take, before it starts: see `estimator` for the result and `rehearsal` for how it is found."""
