"""The training engine: the only room that knows Lightning."""
