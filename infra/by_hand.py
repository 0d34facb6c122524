"""The command that deletes a resource by hand, for what a destroy leaves."""

from __future__ import annotations

import shlex

from infra.google import (
    ACCOUNT,
    ACCOUNT_ROLE,
    PROJECT_ROLE,
    REPOSITORY,
    REPOSITORY_ROLE,
    SECRET,
    SECRET_ROLE,
    Declared,
)


def deletion(one: Declared) -> str:
    """The gcloud command that deletes `one`: an account, a secret, a registry, or a grant on one of
    them or on the project. Errors: `ValueError` for anything else."""
    kind, inputs = one.type_token, one.inputs
    project = f"--project={inputs.get('project')}"
    if kind == ACCOUNT:
        email = one.physical_id.rpartition("/")[2]
        return _command("iam service-accounts delete", email, project)
    if kind == SECRET:
        return _command("secrets delete", inputs["secret_id"], project)
    if kind == REPOSITORY:
        location = f"--location={inputs['location']}"
        return _command("artifacts repositories delete", inputs["repository_id"], location, project)
    if kind == PROJECT_ROLE:
        return _ungrant("projects", one, inputs["project"])
    if kind == SECRET_ROLE:
        return _ungrant("secrets", one, inputs["secret_id"], project)
    if kind == ACCOUNT_ROLE:
        email = inputs["service_account_id"].rpartition("/")[2]
        return _ungrant("iam service-accounts", one, email)
    if kind == REPOSITORY_ROLE:
        location = f"--location={inputs['location']}"
        return _ungrant("artifacts repositories", one, inputs["repository"], location, project)
    raise ValueError(f"{one.name}: no command deletes a {kind}")


def _ungrant(group: str, one: Declared, *words: str) -> str:
    member, role = f"--member={one.inputs['member']}", f"--role={one.inputs['role']}"
    return _command(f"{group} remove-iam-policy-binding", *words, member, role)


def _command(verb: str, *words: str) -> str:
    return f"gcloud {verb} {shlex.join(words)}"
