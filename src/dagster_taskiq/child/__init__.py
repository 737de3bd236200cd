"""Inside the child process, where Dagster works: what it is told, what it may write, what its ops can ask."""
