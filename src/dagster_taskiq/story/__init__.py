"""What happened to one run, and what it waits for: a model, made from its event log, and pictures of it."""
