"""Judges and metrics."""
