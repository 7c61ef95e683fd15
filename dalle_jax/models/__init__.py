"""One file, one network, in the paper's order. Imports nn."""
