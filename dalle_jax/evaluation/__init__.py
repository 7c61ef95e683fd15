"""Suites that measure trained networks, and their judges and metrics."""
