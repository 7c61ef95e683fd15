"""Trained networks, opened once from their folders, with what they need to be used."""
