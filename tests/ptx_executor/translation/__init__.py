"""Instructions as Python: every basic block becomes a function over numpy arrays."""
