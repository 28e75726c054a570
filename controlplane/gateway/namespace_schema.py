"""What callers send and get of namespaces, as pydantic models; the rest is in `schema`.

The same parts stand in bodies and in answers, so that what was got can be sent back. Unknown fields and wrong
types are refused by name.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from controlplane.api import limits


class _Part(BaseModel):
    """Strict, in both directions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Quota(_Part):
    """What a tenant may hold; what is left out is unbounded."""

    devices: Annotated[int, Field(ge=0, le=limits.QUOTA_MAX)] | None = Field(
        default=None, description="Devices held by placed replicas; a shared device counts once."
    )
    replicas: Annotated[int, Field(ge=0, le=limits.QUOTA_MAX)] | None = Field(
        default=None, description="Replicas placed."
    )


class AliasTarget(_Part):
    """One deployment behind an alias."""

    deployment: str = Field(description="Deployment of the same namespace.")
    weight: Annotated[int, Field(ge=1, le=limits.ALIAS_WEIGHT_MAX)] = Field(
        default=1, description="Share of the requests relative to the other targets."
    )


class ModelAlias(_Part):
    """A model name that leads to deployments."""

    name: str = Field(description="What clients send as `model`.", examples=["gpt-4o-mini"])
    targets: list[AliasTarget] = Field(
        min_length=1,
        max_length=limits.ALIAS_TARGETS_MAX,
        description="Where it leads; several share the requests by weight.",
    )


class NamespaceChange(_Part):
    """Fields to replace; `null` takes a field back to its default."""

    quota: Quota | None = Field(default=None, description="What it may hold; null for no bound.")
    aliases: list[ModelAlias] | None = Field(
        default=None, max_length=limits.ALIASES_MAX, description="Model names beside those of deployments."
    )


class Namespace(_Part):
    """A tenant."""

    name: str
    etag: str
    quota: Quota | None
    aliases: list[ModelAlias]


class NamespacePage(BaseModel):
    """One page of namespaces."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    namespaces: list[Namespace]
    next_page_token: str
