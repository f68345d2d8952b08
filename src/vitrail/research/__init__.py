"""MANY IMAGES OR MODELS -> A TABLE. Read `parity`."""
