"""Google's services behind one port: jobs, logs, secrets, storage, access, a machine's metadata.

    with Google(clock) as server:
        env.update(server.environ())

`environ` holds what the official tools read, so that any of them can be pointed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from launcher.clock import Clock, SystemClock
from launcher.rehearsal.access import Access
from launcher.rehearsal.faults import Schedule
from launcher.rehearsal.gcs import Gcs
from launcher.rehearsal.gcs_state import Objects
from launcher.rehearsal.http import Request, Response, Server
from launcher.rehearsal.logging import Logging
from launcher.rehearsal.secrets import Metadata, Secrets
from launcher.rehearsal.vertex import Vertex

_SERVICES = (
    "AIPLATFORM", "ARTIFACTREGISTRY", "CLOUDRESOURCEMANAGER", "IAM", "LOGGING", "SECRETMANAGER",
    "SERVICEUSAGE", "STORAGE",
)  # fmt: skip


class Google(Server):
    """A server of all of them; `folder`: the state outlives the process there."""

    def __init__(
        self,
        clock: Optional[Clock] = None,
        *,
        folder: Optional[Path] = None,
        port: int = 0,
        faults: Optional[Schedule] = None,
        project: str = "rehearsal",
    ) -> None:
        clock = clock or SystemClock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.project = project
        self.logging = Logging(clock, folder)
        self.vertex = Vertex(clock, self.logging, folder / "vertex" if folder else None)
        self.secrets, self.metadata = Secrets({}), Metadata(project)
        self.access = Access()
        self.objects = Objects(folder / "gcs" if folder else None, clock=clock)
        self.objects.finalized.append(lambda b, name, _: self.vertex.written(f"gs://{b}/{name}"))
        self._gcs = Gcs(self.objects)
        super().__init__(self._answer, port=port, faults=faults, clock=clock)
        self.vertex.environ.update(self.environ())

    def __enter__(self) -> Google:
        self.start()
        return self

    def stop(self) -> None:
        super().stop()
        self.vertex.stop()

    def environ(self) -> dict[str, str]:
        """The variables that point Google's tools at this server. (gcloud wants the slash.)"""
        names = {f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}": f"{self.url}/" for name in _SERVICES}
        return {
            **names,
            "STORAGE_EMULATOR_HOST": self.url,
            # The one is asked for tokens, the other whether anybody is there.
            **dict.fromkeys(("GCE_METADATA_HOST", "GCE_METADATA_IP"), f"127.0.0.1:{self.port}"),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "GOOGLE_CLOUD_PROJECT": self.project,
        }

    def _answer(self, request: Request) -> Response:
        services = (self.vertex, self.logging, self.secrets, self.access, self.metadata)
        for service in services:
            response = service.handle(request)
            if response is not None:
                return response
        return self._gcs.handle(request)
