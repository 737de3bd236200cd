"""Cleanup handlers, run after the work has stopped: which are due, running them, and what the log says about it."""
