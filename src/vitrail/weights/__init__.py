"""CHECKPOINTS: from a name or a model folder to a network that holds its weights. Read `load`."""
