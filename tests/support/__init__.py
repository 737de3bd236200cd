"""What several tests need: servers of their own, waiting for events."""
