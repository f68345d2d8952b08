"""NETWORKS: image in, logits or features out. `backbone` is the contract, `registry` finds a model by its name."""
