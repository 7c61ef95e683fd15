"""Many runs of one config: their work units, how they are started, what came of them."""
