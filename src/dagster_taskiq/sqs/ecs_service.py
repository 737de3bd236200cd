"""Which task definition an ECS service starts now. Knows botocore and one request; not what the answer is for."""

import asyncio
from typing import Final

from dagster_taskiq.sqs.errors import translated

_WITHIN_S: Final = 10.0


async def task_definition_of(service: str, cluster: str, region_name: str) -> str | None:
    """The ARN of the task definition; None when there is no such service.

    Needs `ecs:DescribeServices`. Raises a `DagsterTaskiqError` when ECS refuses or does not answer.
    """
    import aioboto3

    with translated(f"ECS service {service}", region_name):
        async with asyncio.timeout(_WITHIN_S), aioboto3.Session().client("ecs", region_name=region_name) as ecs:
            answer = await ecs.describe_services(cluster=cluster, services=[service])
    return next((str(one["taskDefinition"]) for one in answer["services"]), None)
