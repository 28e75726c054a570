"""Who calls, and what they may do: keys, hashes, roles.

In come bearer tokens, out come principals. Secrets are compared in constant time, kept as SHA-256
hashes and never logged. A key has 256 random bits, so a plain hash is enough: there is nothing to
guess, and the router can afford it on every request. Nothing here does I/O.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

API_KEY_PREFIX = "sk-"
# Enough to recognise a key in a list, far too little to use it.
DISPLAY_PREFIX_LENGTH = 8
# Longer credentials are refused before they are hashed.
CREDENTIAL_LENGTH_MAX = 512


class Role(IntEnum):
    """What a principal may do; a larger role includes the smaller ones, except AGENT and ROUTER."""

    VIEWER = 10
    OPERATOR = 20
    ADMIN = 30
    # Stands beside the others: an agent may report, and may not read or declare anything.
    AGENT = -1
    # Beside the others as well: a router may read what it routes by, and nothing else.
    ROUTER = -2


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller."""

    name: str
    role: Role


def generate_api_key() -> str:
    """Makes a new key with 256 random bits."""
    return API_KEY_PREFIX + secrets.token_hex(32)


def generate_token() -> str:
    """Makes a bootstrap token with 256 random bits."""
    return secrets.token_hex(32)


def hash_secret(secret: str) -> str:
    """Returns the SHA-256 of a secret in lower-case hexadecimal."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def display_prefix(secret: str) -> str:
    """Returns the part of a key that may be shown again."""
    return secret[:DISPLAY_PREFIX_LENGTH] + "…"


def bearer_token(header: str | None) -> str | None:
    """Extracts the token of an `Authorization` header; None when there is none worth looking at."""
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > CREDENTIAL_LENGTH_MAX:
        return None
    return token


class TokenAuthenticator:
    """Knows a fixed set of tokens by their hashes."""

    def __init__(self, tokens: Mapping[str, Principal]) -> None:
        """Takes token to principal; only the hashes are kept."""
        self._principals = {hash_secret(token): who for token, who in tokens.items() if token}

    def authenticate(self, token: str) -> Principal | None:
        """Returns who the token belongs to; compares with every hash in constant time."""
        presented = hash_secret(token)
        found: Principal | None = None
        for known, who in self._principals.items():
            if hmac.compare_digest(known, presented):
                found = who
        return found


_BESIDE = frozenset({Role.AGENT, Role.ROUTER})


def allows(role: Role, required: Role) -> bool:
    """Tells whether a role may do what needs `required`."""
    if role in _BESIDE or required in _BESIDE:
        # An admin can stand in for an agent or a router: operators debug with the one token they have.
        return role == required or (required in _BESIDE and role is Role.ADMIN)
    return role >= required
