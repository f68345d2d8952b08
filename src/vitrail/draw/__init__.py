"""Pictures and pages: the only room that knows matplotlib."""
