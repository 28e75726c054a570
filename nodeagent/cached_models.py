"""Models whose weights lie in this machine's Hugging Face cache, so that replicas can be placed near them.

In comes the cache's folder, out come ids as deployments name them. Only names are read, never weights; a
download that never finished has no snapshot and does not count. Writes nothing.
"""

import os
from collections.abc import Mapping
from pathlib import Path

MODELS_MAX = 1000
"""What an inventory carries at most; the names of a thousand models are some 30 KiB."""

_PREFIX = "models--"


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder in which `huggingface_hub` keeps what it fetched, by the variables that it reads."""
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache)
    if home := environment.get("HF_HOME"):
        return Path(home) / "hub"
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface" / "hub"


def cached_models(folder: Path) -> list[str]:
    """Ids of the models with a snapshot in a cache, sorted; none where it cannot be read."""
    found: list[str] = []
    try:
        for entry in sorted(folder.iterdir()):
            snapshots = entry / "snapshots"
            if entry.name.startswith(_PREFIX) and snapshots.is_dir() and any(snapshots.iterdir()):
                found.append(entry.name.removeprefix(_PREFIX).replace("--", "/", 1))
    except OSError:
        # Without a cache, or without the right to read it, nothing is known to be here.
        return []
    return found[:MODELS_MAX]
