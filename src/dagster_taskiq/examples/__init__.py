"""Example jobs that work on what every machine has: the Python source files that are installed on it."""
