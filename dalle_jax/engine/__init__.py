"""One trainer for every task: sharding, state, optimiser, checkpoints, loop. Imports words only."""
