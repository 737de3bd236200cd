"""Cleanup handlers, run after the work has stopped: what is outstanding, running it, and what the log says of it."""
