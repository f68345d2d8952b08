"""PIECES: modules and functions without names, configs or files. Read `attention`, `embed`, `blocks`, `tokens`."""
