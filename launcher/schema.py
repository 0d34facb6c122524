"""The JSON Schema of recipes as people write them, for editors; `recipe.load` is the judge.

A schema sees one file. What `extends:` or a pipeline's top may supply is therefore not required
here, null (which removes what is inherited) is allowed, and `${VAR}` stands for any scalar.
"""

from __future__ import annotations

from typing import Any, Optional

from launcher import drafts
from launcher.spec import NAME, Budget, Code, Expected, Gate, Hardware, Infra, Notify, Retry
from trainer.config import (
    STAGES,
    Data,
    Distill,
    Evaluate,
    Export,
    Grpo,
    Merge,
    Model,
    Preference,
    Sdce,
    Smoke,
    Targets,
    Tokenizer,
    Train,
)

_BLOCKS = {
    "model": Model,
    "data": Data,
    "train": Train,
    "kd": Distill,
    "sdce": Sdce,
    "preference": Preference,
    "grpo": Grpo,
    "targets": Targets,
    "tokenizer": Tokenizer,
    "evaluate": Evaluate,
    "merge": Merge,
    "export": Export,
    "smoke": Smoke,
    "hardware": Hardware,
    "forecast": Expected,
    "budget": Budget,
    "retry": Retry,
    "infra": Infra,
    "code": Code,
}
_VARIABLE = {"type": "string", "pattern": r"\$\{"}
_SECRET_REFERENCE = "^(env://|secret-manager://|\\$\\{)"


def json_schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12."""
    from pydantic import TypeAdapter  # only `launch schema` pays for it

    definitions: dict[str, Any] = {}
    for kind in (*_BLOCKS.values(), Gate, Notify):
        found = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions.update(found.pop("$defs", {}))
        definitions[kind.__name__] = found
    definitions = {name: _relaxed(schema) for name, schema in definitions.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "launch recipe",
        "$ref": "#/$defs/Recipe",
        "$defs": {**definitions, "Entry": _entry(), "Recipe": _recipe()},
    }


def _recipe() -> dict[str, Any]:
    keys = {
        **_stage_keys(drafts.TOP),
        "launch": {"const": 1, "description": "The version of this syntax."},
        "name": {"type": "string", "pattern": NAME.pattern},
        "description": _text(),
        "extends": _text("A recipe below this one, relative to this file."),
        "pipeline": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/Entry"}},
        "env": _optional({"type": "object", "additionalProperties": {"type": "string"}}),
        "secrets": _optional(
            {
                "type": "object",
                "additionalProperties": {"type": "string", "pattern": _SECRET_REFERENCE},
            }
        ),
        "artifacts": _optional(_text("Where a run's files go; {run} is the run's name.")),
        "tensorboard": _optional(_text("Another bucket folder for TensorBoard's files.")),
        "notify": _optional({"type": "array", "items": {"$ref": "#/$defs/Notify"}}),
    }
    assert set(keys) == set(drafts.TOP)
    complete = {"required": ["launch", "name"]}
    return {**_object(keys), "anyOf": [{"required": ["extends"]}, complete]}


def _entry() -> dict[str, Any]:
    keys = {
        **_stage_keys(drafts.ENTRY),
        "id": {"type": "string", "pattern": NAME.pattern},
        "recipe": _text("A recipe file, relative to this one, whose stage this is."),
        "needs": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Earlier stages; by default the one before.",
        },
    }
    assert set(keys) == set(drafts.ENTRY)
    return {**_object(keys), "required": ["id"]}


def _stage_keys(allowed: tuple[str, ...]) -> dict[str, Any]:
    gate = {"$ref": "#/$defs/Gate"}
    blocks = {
        name: _optional({"$ref": f"#/$defs/{kind.__name__}"})
        for name, kind in _BLOCKS.items()
        if name in allowed
    }
    return {
        **blocks,
        "stage": _optional({"enum": list(STAGES)}),
        "gate": {"anyOf": [gate, {"type": "array", "items": gate}, {"type": "null"}]},
    }


def _object(keys: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": keys, "additionalProperties": False}


def _text(description: Optional[str] = None) -> dict[str, Any]:
    return {"type": "string", **({"description": description} if description else {})}


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _relaxed(schema: dict[str, Any]) -> dict[str, Any]:
    """A definition of pydantic's without what only the merged recipe must have."""
    kept = {key: value for key, value in schema.items() if key not in ("required", "title")}
    if "properties" in kept:
        kept["properties"] = {
            key: _relaxed_property(child) for key, child in kept["properties"].items()
        }
    return kept


def _relaxed_property(schema: dict[str, Any]) -> dict[str, Any]:
    inner = {key: value for key, value in schema.items() if key not in ("title", "default")}
    options = inner.pop("anyOf", None) or [inner]
    options = [option for option in options if option != {"type": "null"}]
    scalar = any(o.get("type") not in ("object", "array") and "$ref" not in o for o in options)
    extra = [_VARIABLE] if scalar else []
    relaxed: dict[str, Any] = {"anyOf": [*options, *extra, {"type": "null"}]}
    if "default" in schema:
        relaxed["default"] = schema["default"]
    return relaxed
