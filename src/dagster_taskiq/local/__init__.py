"""Everything on one laptop: `dagster-taskiq dev`, `dagster-taskiq demo`, and the processes of both."""
