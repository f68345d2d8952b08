"""TABLES: other people's names of weights, a file a family. `vitrail.weights.keymap` says how they are read."""
