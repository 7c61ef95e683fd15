"""Network matter: attention, transformer, convolutions, quantisers. Imports words only."""
