"""Reads a model's configuration, and names whatever is missing or wrong in it.

In comes the parsed `config.json`, out come whole numbers, flags and texts by name, and the dimensions that
every architecture has. Knows nothing of what they mean for memory. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from core.errors import InvalidArgument

Config = Mapping[str, object]

FIELD = "model"
# No published model comes near; larger numbers are mistakes and would overflow 64-bit sums.
DIMENSION_MAX = 1 << 31


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads a configuration and names whatever is missing or wrong in it."""

    config: Config

    def integer(self, *names: str) -> int:
        """The first of the names that is present; refuses when none is."""
        value = self.optional(*names)
        if value is None:
            raise InvalidArgument.of(
                FIELD, f"the model's config.json lacks `{names[0]}`, which sizing needs; use a complete model"
            )
        return value

    def optional(self, *names: str) -> int | None:
        """The first of the names that is present and not null."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < DIMENSION_MAX:
                raise InvalidArgument.of(
                    FIELD, f"the model's config.json has {value!r} for `{name}`; a whole number is expected"
                )
            return value
        return None

    def positive(self, *names: str) -> int:
        """Like `integer`, and refuses zero."""
        value = self.integer(*names)
        if value == 0:
            raise InvalidArgument.of(
                FIELD, f"the model's config.json has 0 for `{names[0]}`; it must be at least 1"
            )
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A switch; the default where it is absent or null."""
        value = self.config.get(name, default)
        return default if value is None else bool(value)

    def text(self, *names: str) -> str:
        """The first of the names that holds a text; empty when none does."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, str):
                return value
        return ""

    def mapping(self, *names: str) -> Config:
        """The first of the names that holds an object; empty when none does."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, Mapping):
                return cast("Config", value)
        return {}


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions that every family has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def read(cls, reader: Reader) -> "Shape":
        """Reads the dimensions.

        Raises:
            InvalidArgument: One is missing or wrong.
        """
        hidden, heads = reader.positive("hidden_size"), reader.positive("num_attention_heads")
        return cls(
            hidden=hidden,
            layers=reader.positive("num_hidden_layers"),
            heads=heads,
            kv_heads=reader.optional("num_key_value_heads") or heads,
            head_dim=reader.optional("head_dim") or hidden // heads,
            vocabulary=reader.positive("vocab_size"),
        )
