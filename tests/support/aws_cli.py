"""As much of AWS's command line as our pages use, by botocore, against the endpoint in `AWS_ENDPOINT_URL`.

The real one cannot be installed beside us: it wants its own version of botocore.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import botocore.session
import jmespath  # type: ignore[import-untyped]


def client(service: str) -> Any:
    region = os.environ["AWS_REGION"]
    return botocore.session.Session().create_client(service, region, endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def deploy(options: dict[str, list[str]]) -> None:
    """`aws cloudformation deploy`: what it is not told about a stack that is there already stays as it was."""
    cloud = client("cloudformation")
    given = dict(one.split("=", 1) for one in options.get("parameter-overrides", []))
    (name,), (file,) = options["stack-name"], options["template-file"]
    there = {stack["StackName"]: stack.get("Parameters", []) for stack in cloud.describe_stacks()["Stacks"]}
    given = {one["ParameterKey"]: one["ParameterValue"] for one in there.get(name, [])} | given
    (cloud.update_stack if name in there else cloud.create_stack)(
        StackName=name,
        TemplateBody=Path(file).read_text(),
        Capabilities=options.get("capabilities", []),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
    )
    (stack,) = cloud.describe_stacks(StackName=name)["Stacks"]
    assert stack["StackStatus"] in ("CREATE_COMPLETE", "UPDATE_COMPLETE"), stack
    print(f"Successfully created/updated stack - {name}")


def wait(service: str, waiter: str, option: str, stack: str) -> None:
    """`aws cloudformation wait stack-delete-complete --stack-name NAME`."""
    assert option == "--stack-name"
    client(service).get_waiter(waiter.replace("-", "_")).wait(StackName=stack, WaiterConfig={"Delay": 1})


def value_of(texts: list[str], shape: Any) -> Any:
    if shape.type_name == "list":
        return [value_of([text], shape.member) for text in texts]
    if shape.type_name == "structure":  # shorthand: name=containerInsights,value=enabled
        return dict(part.split("=", 1) for part in texts[0].split(","))
    if shape.type_name == "map":
        return dict(text.split("=", 1) for text in texts)
    return int(texts[0]) if shape.type_name in ("integer", "long") else texts[0]


def main(arguments: list[str]) -> None:
    service, operation, *rest = arguments
    if operation == "wait":
        waiter, option, name = rest
        return wait(service, waiter, option, name)
    options: dict[str, list[str]] = {}
    for argument in rest:
        if argument.startswith("--"):
            options[argument[2:]] = []
        else:
            options[[*options][-1]].append(argument)
    query, output = options.pop("query", None), options.pop("output", ["json"])
    if (service, operation) == ("cloudformation", "deploy"):
        return deploy(options)
    asked = client(service)
    name = "".join(part.capitalize() for part in operation.split("-"))
    members = asked.meta.service_model.operation_model(name).input_shape.members
    known = {re.sub(r"(?<!^)(?=[A-Z])", "-", member).lower(): member for member in members}
    given = {known[option]: value_of(texts, members[known[option]]) for option, texts in options.items()}
    answer = getattr(asked, operation.replace("-", "_"))(**given)
    answer.pop("ResponseMetadata", None)
    found = jmespath.search(query[0], answer) if query else answer
    texts = found if isinstance(found, list) else [found]
    print("\t".join(map(str, texts)) if output == ["text"] else json.dumps(found, default=str))
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
