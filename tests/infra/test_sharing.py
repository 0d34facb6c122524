"""Recipes that share a stack: what an update for one declares, holds and lets go, as plain data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import sharing
from infra.errors import Unreadable
from infra.google import Expiry, Foundations, resources
from infra.sharing import OUTPUT, Declarations, Update
from tests.infra.registered import FULL

TUNA = Foundations(
    "tuna", "proj-123", "us-central1", services=("storage.googleapis.com",), bucket="my-bkt",
    accounts=("tuna@proj-123.iam.gserviceaccount.com",), secrets=("hf-token", "tuna-token"),
)  # fmt: skip
BASS = replace(
    TUNA, name="bass", region="europe-west4", bucket_location="us-central1",
    accounts=("bass@proj-123.iam.gserviceaccount.com",), secrets=("hf-token", "bass-token"),
)  # fmt: skip


def _names(*of: Foundations) -> set[str]:
    return {one.name for f in of for one in resources(f)}


def _all(*of: Foundations) -> Declarations:
    """The stack after an update for each."""
    return Declarations({f.name: (f,) for f in of}, frozenset(_names(*of)))


def _declared(update: Update) -> list[str]:
    return [one.name for one in update.declared]


def test_what_the_state_is_told_is_read_back_as_it_was() -> None:
    older = replace(FULL, secrets=(), bucket=None)
    records = {"kd-l4": (FULL, older), "tuna": (TUNA,)}

    assert sharing.read({OUTPUT: sharing.written(records), "project": "proj-123"}) == records
    assert sharing.read({}) == {}


def test_the_one_that_is_applied_comes_first_and_others_are_held_as_they_are() -> None:
    update = _all(TUNA, BASS).applying(TUNA)

    own = [one.name for one in resources(TUNA)]
    assert _declared(update)[: len(own)] == own
    assert set(_declared(update)) == _names(TUNA, BASS)
    assert set(update.hold) == _names(BASS) - _names(TUNA)
    assert "secret-bass-token" in update.hold and "bucket" not in update.hold
    for number, one in enumerate(update.declared):
        assert set(one.after) <= set(_declared(update)[:number])


def test_what_another_declared_and_the_state_has_not_is_not_made_for_it() -> None:
    seen = Declarations({"bass": (BASS,)}, frozenset({"bucket", "account-bass"}))

    update = seen.applying(replace(TUNA, services=()))

    assert "secret-bass-token" not in _declared(update)
    (held,) = (one for one in update.declared if one.name == "account-bass")
    assert held.name in update.hold


def test_the_outputs_name_what_all_of_them_use_and_who_declares_what() -> None:
    exports = _all(BASS).applying(TUNA).exports

    assert exports["region"] == "us-central1"  # of the one that was applied
    assert exports["service_accounts"] == [*TUNA.accounts, *BASS.accounts]
    assert len(exports["secrets"]) == 3
    assert sharing.read(exports) == {"tuna": (TUNA,), "bass": (BASS,)}


def test_a_declaration_is_noted_before_anything_of_it_is_made() -> None:
    seen = _all(BASS)

    noting = seen.noting(TUNA)

    assert not seen.noted(TUNA)
    assert set(_declared(noting)) == set(noting.hold) == seen.there
    assert sharing.read(noting.exports)["tuna"] == (TUNA,)
    assert noting.exports["service_accounts"] == list(BASS.accounts)


def test_what_a_recipe_declared_before_stays_known_until_it_is_gone() -> None:
    smaller = replace(TUNA, secrets=())
    noted = sharing.read(_all(TUNA, BASS).noting(smaller).exports)
    assert noted["tuna"] == (smaller, TUNA)
    half_way = Declarations(noted, frozenset(_names(TUNA, BASS)))

    assert half_way.noted(smaller)
    assert "secret-tuna-token" in half_way.applying(BASS).hold  # another's update leaves it
    assert "secret-tuna-token" not in _declared(half_way.applying(smaller))
    assert "secret-tuna-token" in half_way.alone("tuna")

    gone = Declarations(noted, frozenset(_names(smaller, BASS)))
    assert sharing.read(gone.applying(smaller).exports)["tuna"] == (smaller,)


def test_a_destroy_lets_go_what_nobody_else_declares_and_then_forgets() -> None:
    seen = _all(TUNA, BASS)

    leaving, forgetting = seen.leaving("tuna"), seen.forgetting("tuna")

    assert set(_declared(leaving)) == set(leaving.hold) == _names(BASS)
    assert seen.there - set(_declared(leaving)) == set(seen.alone("tuna"))
    assert sharing.read(leaving.exports).keys() == {"tuna", "bass"}
    assert sharing.read(forgetting.exports) == {"bass": (BASS,)}
    assert _declared(forgetting) == _declared(leaving)


def test_what_was_there_before_stays_with_the_grants_between_such() -> None:
    ann = replace(FULL, operators=("user:ann@example.com",), viewers=())
    account = "serviceAccount:trainer@proj-123.iam.gserviceaccount.com"
    seen = Declarations({}, frozenset()).adopting(["account-trainer", "secret-hf-token", "bucket"])

    update = seen.applying(replace(ann, retain_bucket=False))

    assert {one.name for one in update.declared if one.retain} == {
        "account-trainer", "secret-hf-token",
        f"project-logging.logWriter-{account}",
        f"secret-hf-token-secretmanager.secretAccessor-{account}",
        "secret-hf-token-secretmanager.secretVersionAdder-user:ann@example.com",
        "account-trainer-iam.serviceAccountUser-user:ann@example.com",
    }  # fmt: skip
    assert sharing.adopted(update.exports) == seen.before


def test_what_was_there_before_is_remembered_until_nobody_names_it() -> None:
    seen = _all(TUNA, BASS).adopting(["account-tuna", "secret-hf-token"])

    assert {one.name for one in seen.applying(BASS).declared if one.retain} >= {
        "account-tuna", "secret-hf-token",
    }  # fmt: skip
    assert sharing.adopted(seen.leaving("tuna").exports) == {"account-tuna", "secret-hf-token"}
    assert sharing.adopted(seen.forgetting("tuna").exports) == {"secret-hf-token"}
    assert sharing.adopted(_all(TUNA).applying(TUNA).exports) == frozenset()


def test_names_of_what_was_there_before_that_are_damaged_are_told() -> None:
    with pytest.raises(Unreadable, match="there_before: 'bucket' is no list of names"):
        sharing.adopted({sharing.BEFORE: "bucket"})


def test_resources_that_others_declare_otherwise_are_named() -> None:
    kept_less = replace(TUNA, expiries=(Expiry(7, prefix="tmp/"),))

    assert _all(TUNA, BASS).otherwise(TUNA) == {}
    assert _all(BASS).otherwise(kept_less) == {"bucket": ["bass"]}
    assert _all(BASS).otherwise(replace(TUNA, retain_bucket=False)) == {"bucket": ["bass"]}


def test_what_nobody_declares_is_unknown() -> None:
    seen = Declarations({"tuna": (TUNA,)}, frozenset({"bucket", "secret-bass-token", "stray"}))

    assert seen.unknown() == ["secret-bass-token", "stray"]
    assert seen.unknown(BASS) == ["stray"]


_KEYS = json.loads(sharing.written({"tuna": (TUNA,)})["tuna"])["declares"][0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "tuna: "),
        (None, "tuna: "),
        ("[]", "tuna: no version"),
        ({"declares": []}, "tuna: no version"),
        ({"version": 1, "declares": []}, "not a declaration of tuna"),
        ({"version": 1, "declares": [{**_KEYS, "name": "bass"}]}, "not a declaration of tuna"),
        ({"version": 1, "declares": [{**_KEYS, "more": 1}]}, "tuna[0].more: unknown"),
        ({"version": 1, "declares": [{"name": "tuna"}]}, ": missing"),
        ({"version": 1, "declares": [{**_KEYS, "secrets": "hf"}]}, "'hf' is not list"),
        ({"version": 1, "declares": [{**_KEYS, "retain_bucket": 0}]}, "0 is not bool"),
        ({"version": 1, "declares": [{**_KEYS, "expiries": [{"days": True}]}]}, "expiries[0]"),
        ({"version": 2, "declares": []}, "by a newer launch (version 2; this one reads 1)"),
    ],
)
def test_a_damaged_or_newer_declaration_is_told_in_one_line(text: object, told: str) -> None:
    given = json.dumps(text) if isinstance(text, dict) else text

    with pytest.raises(Unreadable) as refused:
        sharing.read({OUTPUT: {"tuna": given}})

    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "nothing was changed" in refused.value.hint


def test_declarations_that_are_no_mapping_are_damaged() -> None:
    with pytest.raises(Unreadable, match="is no mapping"):
        sharing.read({OUTPUT: ["tuna"]})


_some = st.builds(
    lambda name, services, bucket, accounts, secrets, operators: Foundations(
        name, "proj-123", "us-central1", tuple(services), "my-bkt" if bucket else None,
        accounts=tuple(f"{one}@proj-123.iam.gserviceaccount.com" for one in accounts),
        secrets=tuple(secrets), operators=tuple(operators),
    ),
    st.sampled_from(("tuna", "bass", "cod")),
    st.sets(st.sampled_from(("storage.googleapis.com", "iam.googleapis.com"))),
    st.booleans(),
    st.sets(st.sampled_from(("first", "second"))),
    st.sets(st.sampled_from(("a", "b", "c"))),
    st.sets(st.sampled_from(("user:ann@example.com", "group:ml@example.com"))),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(_some, min_size=1, max_size=5), st.data())
def test_no_update_touches_what_only_another_recipe_declares(
    applied: list[Foundations], data: st.DataObject
) -> None:
    """Any number of updates, each of which may end half-way."""
    seen = Declarations({}, frozenset())
    for f in applied:
        noted = sharing.read(seen.noting(f).exports)
        update = seen.applying(f)
        others = {name for other in seen.others(f.name) for name in seen.alone(other)} - _names(f)
        assert sharing.read(update.exports) == noted
        assert others <= set(update.hold)
        after = set(_declared(update))
        for number, one in enumerate(update.declared):
            assert set(one.after) <= {before.name for before in update.declared[:number]}
        assert after - seen.there <= _names(f)
        done = data.draw(st.booleans())
        there = after if done else seen.there | after  # nothing goes before all is made
        seen = Declarations(noted, frozenset(there))
        assert seen.unknown() == []
