"""One worker's life: what it receives, decides, supervises, and writes down at the end."""
