"""What can be trained: one file per objective, plugged into the engine's socket."""
