"""The arithmetic of diffusion models, without any network. Imports words only."""
