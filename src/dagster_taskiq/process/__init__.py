"""A process tree, and the proof that it is gone. Knows processes and signals; neither Dagster nor SQS."""
