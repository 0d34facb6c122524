"""Secrets from Google Secret Manager, read with the identity of the job. The client is imported on
use; values go to the caller alone and never into a message.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import Any

from trainer.boot import AGAIN, CONFIG, ENVIRONMENT, BootError

_REFERENCE = re.compile(r"([a-z0-9:.-]+)/([A-Za-z0-9_-]+)(?:/([A-Za-z0-9_-]+))?")
_ROLE = "roles/secretmanager.secretAccessor"
_SECONDS = 60.0


def read(name: str, source: str) -> str:
    """The value for the variable `name` from `source`, PROJECT/NAME[/VERSION] (default: latest).

    Errors: `BootError` 78 for one that is absent, disabled or not ours to read; 75 when the
    service does not answer; 64 for a reference that is none."""
    match = _REFERENCE.fullmatch(source)
    if match is None:
        allowed = "write secret-manager://PROJECT/NAME or secret-manager://PROJECT/NAME/VERSION"
        raise BootError(CONFIG, f"secret {name}: secret-manager://{source}: {allowed}")
    project, secret, version = match[1], match[2], match[3] or "latest"
    resource = f"projects/{project}/secrets/{secret}/versions/{version}"
    auth, core = _library("google.auth.exceptions"), _library("google.api_core.exceptions")
    failed = f"secret {name}: cannot read {resource}"
    try:
        answer = _client().access_secret_version(name=resource, timeout=_SECONDS)
        return str(answer.payload.data.decode())
    except UnicodeDecodeError:
        raise BootError(ENVIRONMENT, f"{failed}: its value is not text in UTF-8") from None
    except auth.DefaultCredentialsError as error:
        raise BootError(ENVIRONMENT, f"{failed}: this machine has no Google identity") from error
    except (core.NotFound, core.FailedPrecondition) as error:
        gone = "it does not exist, or has no such version that is enabled"
        make = f"gcloud secrets versions list {secret} --project={project}"
        raise BootError(ENVIRONMENT, f"{failed}: {gone}; see: {make}") from error
    except (core.Forbidden, core.Unauthorized) as error:
        grant = f"gcloud secrets add-iam-policy-binding {secret} --project={project}"
        what = f"{failed}: denied; grant the job's service account {_ROLE}: {grant} --role={_ROLE}"
        raise BootError(ENVIRONMENT, what) from error
    except core.GoogleAPICallError as error:
        code = int(getattr(error, "code", None) or 0)
        again = code == 429 or code >= 500
        what = f"{failed}: the service answers {code}" + ("; try again later" if again else "")
        raise BootError(AGAIN if again else ENVIRONMENT, what) from error
    except (core.RetryError, auth.TransportError, OSError) as error:  # requests' are OSErrors
        what = f"{failed}: the service does not answer ({type(error).__name__}); try again later"
        raise BootError(AGAIN, what) from error
    except auth.GoogleAuthError as error:
        raise BootError(ENVIRONMENT, f"{failed}: the Google identity is not accepted") from error


def _client() -> Any:
    manager = _library("google.cloud.secretmanager_v1")
    given: dict[str, Any] = {"transport": "rest"}  # no gRPC: its threads do not survive a fork
    endpoint = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER")
    if endpoint:
        given["client_options"] = {"api_endpoint": endpoint.rstrip("/")}
    if os.environ.get("CLOUDSDK_AUTH_DISABLE_CREDENTIALS", "").lower() in ("1", "true", "yes"):
        given["credentials"] = _library("google.auth.credentials").AnonymousCredentials()
    return manager.SecretManagerServiceClient(**given)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        what = "secret-manager:// needs google-cloud-secret-manager in the image"
        raise BootError(ENVIRONMENT, f"{what}: pip install google-cloud-secret-manager") from error
