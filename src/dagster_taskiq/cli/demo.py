"""`dagster-taskiq demo`: everything on this machine."""

import click


@click.command()
def demo() -> None:
    """D."""
