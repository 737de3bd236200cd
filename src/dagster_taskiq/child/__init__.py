"""Inside the child process, where Dagster works: what it receives, what it may write, what its ops can ask."""
