"""The project that `dagster-taskiq dev` serves and `demo` runs. In a checkout it is in `examples/`."""
