"""The foundations that a recipe needs, read off the recipe: what `launch infra` declares.

Only names are read here; nothing is asked of the cloud, and Pulumi is not loaded. What lies in
another project, and buckets that the recipe only reads, are never declared: they are listed as
what has to be there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Optional

from infra.google import Expiry, Foundations, Repository
from launcher import home
from launcher.backends.vertex.jobs import project_of
from launcher.errors import RecipeError
from launcher.references import references
from launcher.spec import Infra, Recipe

#: Where Vertex AI runs a recipe that names no place.
_REGION = "us-central1"
_BUCKET = re.compile(r"gs://([^/]+)(?:/|\Z)")
_SECRET = re.compile(r"secret-manager://([^/]+)/([^/]+)")
_IMAGE = re.compile(r"([a-z0-9-]+)-docker\.pkg\.dev/([^/]+)/([^/]+)/")
_ACCOUNT = re.compile(r"([^@]+)@([^@]+)\.iam\.gserviceaccount\.com")
_ALWAYS = ("serviceusage", "cloudresourcemanager", "iam", "storage", "aiplatform", "logging")
