"""Sweeps, many runs of one config: their work units, their runners, their results."""
