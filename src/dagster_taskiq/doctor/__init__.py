"""What is wrong, and how to fix it: the checks of `dagster-taskiq doctor`."""
