"""`dagster-taskiq dev`: everything on this machine."""
import click
@click.command()
def dev() -> None:
    """D."""
