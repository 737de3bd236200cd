"""One Taskiq task, from receipt to settlement. Knows queues and cancellations; no Dagster, no processes."""
