"""How a worker makes its fork server. Knows what a child of Dagster needs to have imported; not what it is for."""

from importlib import import_module

from dagster_taskiq._gc import collection_paused
from dagster_taskiq.child.main import PRELOAD, WARM_UP
from dagster_taskiq.dagster_compat.api import InstanceRef, serialize_value
from dagster_taskiq.dagster_compat.instance import import_what_opening_takes, read_instance_ref
from dagster_taskiq.dagster_compat.storage import read_migration_scripts_once
from dagster_taskiq.process.fork_server import ForkServer
from dagster_taskiq.settings import Settings
from dagster_taskiq.sqs.client import WARM_UP as SQS_WARM_UP


def forked_server(settings: Settings) -> ForkServer:
    """The fork server, forked from this process while it has neither connections nor threads.

    What both of them need is imported before that, once.
    """
    with collection_paused():
        reference = read_instance_ref()
        for module in PRELOAD:
            import_module(module)
        import_what_opening_takes(reference)
        read_migration_scripts_once()
        server = fork_server(reference, settings)
        server.fork_early()
    return server


def fork_server(reference: InstanceRef, settings: Settings) -> ForkServer:
    """The process from which runs are forked: it has imported Dagster and opened the instance once."""
    return ForkServer(
        fresh=settings.start_method == "spawn",
        preload=(*PRELOAD, *settings.preload_modules),
        warm_up={WARM_UP: [serialize_value(reference)], SQS_WARM_UP: []},
    )
