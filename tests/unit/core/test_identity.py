"""Keys, hashes and roles."""

import pytest

from core.identity import (
    CREDENTIAL_LENGTH_MAX,
    Principal,
    Role,
    TokenAuthenticator,
    allows,
    bearer_token,
    display_prefix,
    generate_api_key,
    hash_secret,
)


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("Bearer  abc ", "abc"),
        ("Basic abc", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("abc", None),
        (None, None),
        ("Bearer " + "x" * (CREDENTIAL_LENGTH_MAX + 1), None),
    ],
)
def test_bearer_token(header: str | None, token: str | None) -> None:
    assert bearer_token(header) == token


def test_keys_are_long_different_and_hardly_shown() -> None:
    one, other = generate_api_key(), generate_api_key()
    assert one != other
    assert one.startswith("sk-")
    assert len(one) == 3 + 64
    assert hash_secret(one) != hash_secret(other)
    assert one not in display_prefix(one)


def test_an_authenticator_knows_its_tokens_only() -> None:
    who = Principal("admin", Role.ADMIN)
    known = TokenAuthenticator({"right": who, "": Principal("nobody", Role.ADMIN)})
    assert known.authenticate("right") == who
    assert known.authenticate("wrong") is None
    assert known.authenticate("") is None


@pytest.mark.parametrize(
    ("role", "required", "allowed"),
    [
        (Role.ADMIN, Role.VIEWER, True),
        (Role.VIEWER, Role.OPERATOR, False),
        (Role.OPERATOR, Role.OPERATOR, True),
        (Role.AGENT, Role.VIEWER, False),
        (Role.AGENT, Role.AGENT, True),
        (Role.ADMIN, Role.AGENT, True),
        (Role.OPERATOR, Role.AGENT, False),
        (Role.ROUTER, Role.ROUTER, True),
        (Role.ADMIN, Role.ROUTER, True),
        (Role.ROUTER, Role.VIEWER, False),
        (Role.ROUTER, Role.AGENT, False),
        (Role.AGENT, Role.ROUTER, False),
        (Role.OPERATOR, Role.ROUTER, False),
    ],
)
def test_roles(role: Role, required: Role, *, allowed: bool) -> None:
    assert allows(role, required) is allowed
