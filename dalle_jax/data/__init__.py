"""Datasets, tokenizer, preprocessing and the seekable pipeline. Imports words only."""
