"""What we keep in Dagster's own storage: engine events, claims, heartbeats, the state of steps."""
