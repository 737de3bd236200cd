"""Example jobs. They work on what every machine has: the Python source files that are installed on it."""
