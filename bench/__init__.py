"""Measure what a call costs: exact counts and times against the stock pipeline and the bare network calls."""
