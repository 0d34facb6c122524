"""What Pulumi's programs register, seen from the other end of the wire: types, inputs, dependencies
and options, which mocks alone do not show. A process of its own, for Pulumi's settings are global.

    python -m tests.infra.registered                  FULL, for the golden file
    python -m tests.infra.registered ADOPTED FOLDER   FULL with ADOPTED, and what FOLDER declares
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra import google
from infra.google import Expiry, Foundations, Repository

#: Everything that foundations can hold.
FULL = Foundations(
    name="kd-l4",
    project="proj-123",
    region="us-central1",
    services=tuple(
        f"{name}.googleapis.com"
        for name in ("cloudresourcemanager", "iam", "storage", "logging", "aiplatform",
                     "secretmanager", "artifactregistry")
    ),
    bucket="my-bkt",
    bucket_location="us",
    storage_class="STANDARD",
    expiries=(Expiry(7, prefix="tmp/"), Expiry(30, suffix="/crash_dump.pt")),
    accounts=("trainer@proj-123.iam.gserviceaccount.com",),
    secrets=("hf-token", "WANDB_API_KEY"),
    repositories=(Repository("us-central1", "train"),),
    operators=("user:ann@example.com", "group:ml@example.com"),
    viewers=("group:all@example.com", "user:ann@example.com"),
    missing=("gs://other: has to be there",),
    labels={"managed-by": "launch", "launch-owner": "ann"},
)  # fmt: skip


def seen(program: Callable[[], None]) -> dict[str, Any]:
    """`program` run once: {"resources": {name: ...}, "outputs": ...}, all plain."""
    from pulumi.runtime import mocks, rpc
    from pulumi.runtime.settings import get_root_resource, set_root_resource
    from pulumi.runtime.stack import wait_for_rpcs

    class Mocks(mocks.Mocks):
        def new_resource(self, args: Any) -> Any:
            return f"id-of-{args.name}", args.inputs

        def call(self, args: Any) -> Any:
            raise AssertionError(f"the program asks the cloud: {args.token}")

    class Monitor(mocks.MockMonitor):
        registered: dict[str, Any]

        def RegisterResource(self, request: Any) -> Any:  # noqa: N802
            answer = super().RegisterResource(request)
            if request.type.startswith("gcp:"):
                assert request.name not in self.registered
                self.registered[request.name] = {
                    "type": request.type,
                    "inputs": rpc.deserialize_properties(request.object, keep_unknowns=True),
                    "after": sorted(urn.rpartition("::")[2] for urn in request.dependencies),
                    "retain": request.retainOnDelete,
                    "import": request.importId,
                    "ignored": sorted(request.ignoreChanges),
                }
            return answer

    async def run() -> Any:
        set_root_resource(None)
        mocks.set_mocks(Mocks(), "launch", "kd-l4", preview=False, monitor=monitor)
        program()
        await wait_for_rpcs()
        return get_root_resource()

    monitor = Monitor(Mocks())
    monitor.registered = {}
    stack = asyncio.run(run())
    return {"resources": monitor.registered, "outputs": stack.outputs}


def main(arguments: list[str]) -> None:
    if not arguments:
        told: Any = seen(google.program(FULL))
    else:
        main_file = str(Path(arguments[1]) / "__main__.py")
        told = [
            seen(google.program(FULL, adopt=(arguments[0],))),
            seen(lambda: (runpy.run_path(main_file), None)[1]),
        ]
    sys.stdout.write(json.dumps(told, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
