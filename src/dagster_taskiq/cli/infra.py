"""`dagster-taskiq infra`: the CloudFormation templates of this version, for whoever has only installed the package."""

import click


@click.command(short_help="Print a CloudFormation template.")
@click.option(
    "--show", "template", type=click.Choice(["cluster", "queues", "workers"]), required=True, help="Which one."
)
def infra(template: str) -> None:
    """Print a CloudFormation template: `queues` (with permissions), `cluster` (of ECS), or `workers` (a service).

    \b
    Example:
      dagster-taskiq infra --show queues > queues.yaml
      aws cloudformation deploy --stack-name dagster-queues \\
        --template-file queues.yaml --capabilities CAPABILITY_IAM
    """
    from importlib.resources import files

    text = files("dagster_taskiq").joinpath("infra", f"{template}.yaml").read_text(encoding="utf-8")
    click.echo(text, nl=False)
