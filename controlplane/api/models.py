"""Facts of a declared model: the knowledge base, a directory, the local hub cache, or the hub.

In comes what the user wrote, out come `ModelFacts` for sizing. A hub id that the knowledge base has is
answered without the hub, so that a known model can be declared while the hub is out of reach.
Only `config.json` and the index of the weights are read, both within limits; weights themselves are the node
agents' business. Files are read in threads, so that a slow disk does not stop the API.
"""

import asyncio
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import aiohttp
import structlog
from huggingface_hub import constants, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from controlplane.api import limits
from controlplane.sizing import KnowledgeBase, ModelFacts, facts_from_config
from core.errors import InvalidArgument

_log = structlog.get_logger(__name__)

MODEL_NOT_FOUND = "ERROR_REASON_MODEL_NOT_FOUND"
_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"


class ModelSource(Protocol):
    """Knows models; tests bring their own."""

    async def facts(self, model: str) -> ModelFacts:
        """Returns a model's facts.

        Raises:
            InvalidArgument: Field `model`: there is no such model, or its configuration is of no use.
        """
        ...


class FileModelSource:
    """Knows the knowledge base; reads model directories of this machine and Hugging Face's cache and hub."""

    def __init__(self, knowledge: KnowledgeBase | None = None) -> None:
        """Takes what is known beforehand; None for nothing."""
        self._knowledge = knowledge if knowledge is not None else KnowledgeBase()

    async def facts(self, model: str) -> ModelFacts:
        """Returns a model's facts; waits at most the hub's limit."""
        if model.startswith("/"):
            return await asyncio.to_thread(_from_directory, model)
        known = self._knowledge.model(model)
        if known is not None:
            weight_file_bytes = await asyncio.to_thread(_cached_weight_bytes, model)
            return replace(known.facts, weight_file_bytes=weight_file_bytes)
        return await _from_hub(model)

    async def facts_of_file(self, config: Path) -> ModelFacts:
        """Returns what one configuration file says, without any weights.

        Raises:
            InvalidArgument: Field `model`: the file is of no use.
        """

        def read() -> ModelFacts:
            parsed = _read_json(str(config), config, limits.MODEL_CONFIG_BYTES_MAX)
            return facts_from_config(parsed, weight_file_bytes=None)

        try:
            return await asyncio.to_thread(read)
        except OSError as error:
            raise _not_found(str(config), f"`{config}` cannot be read: {error.strerror or error}") from error


def _not_found(model: str, description: str) -> InvalidArgument:
    error = InvalidArgument.of("model", description, reason=MODEL_NOT_FOUND)
    error.metadata["model"] = model
    return error


def _from_directory(model: str) -> ModelFacts:
    directory = Path(model)
    try:
        if not directory.exists():
            raise _not_found(
                model,
                f"`{model}` does not exist on the control plane's machine; give the path of a model "
                "directory that is there and on the nodes, or a Hugging Face id",
            )
        if not directory.is_dir():
            raise _not_found(model, f"`{model}` is a file; give the model's directory")
        config = directory / _CONFIG
        if not config.is_file():
            raise _not_found(
                model, f"`{model}` holds no {_CONFIG}; give a directory in Hugging Face's layout"
            )
        parsed = _read_json(model, config, limits.MODEL_CONFIG_BYTES_MAX)
        return facts_from_config(parsed, weight_file_bytes=_weight_bytes(model, directory))
    except OSError as error:
        raise _not_found(model, f"`{model}` cannot be read: {error.strerror or error}") from error


async def _from_hub(model: str) -> ModelFacts:
    snapshot = await asyncio.to_thread(_cached, model, _CONFIG)
    if snapshot is not None:
        return await asyncio.to_thread(_from_cache, model, snapshot)
    if constants.HF_HUB_OFFLINE:
        raise _unavailable(model, "is switched off (HF_HUB_OFFLINE)")
    raw = await _download(model, _CONFIG, limits.MODEL_CONFIG_BYTES_MAX)
    facts = facts_from_config(_parse_json(model, _CONFIG, raw), weight_file_bytes=None)
    return replace(facts, weight_file_bytes=await _hub_weight_bytes(model))


async def _hub_weight_bytes(model: str) -> int | None:
    """Sum of the weight files by the hub's index; None where there is none, as for a single file."""
    try:
        raw = await _download(model, _INDEX, limits.MODEL_INDEX_BYTES_MAX)
        # An index may hold tens of thousands of names.
        return _total_size(await asyncio.to_thread(_parse_json, model, _INDEX, raw))
    except InvalidArgument as error:
        _log.info("no index of the weights, sized by parameters", model=model, error=error.message[:200])
        return None


def _unavailable(model: str, why: str) -> InvalidArgument:
    return _not_found(
        model,
        f"`{model}` is not in the local Hugging Face cache and the hub {why}; download it on the nodes and "
        "give its absolute path, or check the id and the network",
    )


def _cached(model: str, file: str) -> Path | None:
    try:
        found = try_to_load_from_cache(model, file)
    except HFValidationError as error:
        raise _not_found(model, f"`{model}` is no Hugging Face id: {error}") from error
    return Path(found) if isinstance(found, str) else None


def _from_cache(model: str, config: Path) -> ModelFacts:
    parsed = _read_json(model, config, limits.MODEL_CONFIG_BYTES_MAX)
    return facts_from_config(parsed, weight_file_bytes=_snapshot_weight_bytes(model, config))


def _cached_weight_bytes(model: str) -> int | None:
    """Sum of the weight files of a known model; None where the cache has none, or the name is no hub id."""
    try:
        snapshot = try_to_load_from_cache(model, _CONFIG)
    except HFValidationError:
        return None
    return _snapshot_weight_bytes(model, Path(snapshot)) if isinstance(snapshot, str) else None


def _snapshot_weight_bytes(model: str, config: Path) -> int | None:
    try:
        return _weight_bytes(model, config.parent)
    except OSError:
        # The cache may hold the configuration alone; the size is then computed from the parameters.
        return None


async def _download(model: str, file: str, bytes_max: int) -> bytes:
    """Fetches a small file; by itself, since the hub's own client waits and retries in threads."""
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = aiohttp.ClientTimeout(total=limits.HUB_TIMEOUT_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers, trust_env=True) as session,
            session.get(hf_hub_url(model, file)) as answer,
        ):
            if answer.status in {401, 403, 404}:
                raise _unavailable(model, f"does not know it or does not give it out (HTTP {answer.status})")
            if answer.status != 200:
                raise _unavailable(model, f"answered HTTP {answer.status}")
            raw = bytearray()
            async for chunk in answer.content.iter_chunked(64 * 1024):
                raw += chunk
                if len(raw) > bytes_max:
                    raise _unavailable(model, f"serves a {file} beyond {bytes_max} bytes")
            return bytes(raw)
    except TimeoutError as error:
        raise _unavailable(model, f"did not answer within {limits.HUB_TIMEOUT_SECONDS:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        _log.info("hub could not serve a file", model=model, file=file, error=repr(error)[:200])
        raise _unavailable(model, "cannot be reached") from error


def _read_json(model: str, path: Path, bytes_max: int) -> Mapping[str, object]:
    # A pipe or device under that name would block the thread for ever.
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _not_found(model, f"`{path}` is no regular file")
    if status.st_size > bytes_max:
        raise _not_found(model, f"`{path}` has {status.st_size} bytes; at most {bytes_max} are read")
    return _parse_json(model, str(path), path.read_bytes()[: bytes_max + 1])


def _parse_json(model: str, name: str, raw: bytes) -> Mapping[str, object]:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _not_found(model, f"`{name}` is no valid JSON: {str(error)[:200]}") from error
    if not isinstance(parsed, dict):
        raise _not_found(model, f"`{name}` holds no JSON object")
    return parsed


def _weight_bytes(model: str, directory: Path) -> int | None:
    """Sum of the weight files: by the index's own total, else by the files; None where there are none."""
    index = directory / _INDEX
    if index.is_file():
        total = _total_size(_read_json(model, index, limits.MODEL_INDEX_BYTES_MAX))
        if total is not None:
            return total
    total_bytes = 0
    with os.scandir(directory) as entries:
        for count, entry in enumerate(entries):
            if count >= limits.MODEL_FILES_MAX:
                break
            if entry.name.endswith(".safetensors") and entry.is_file():
                total_bytes += entry.stat().st_size
    return total_bytes or None


def _total_size(index: Mapping[str, object]) -> int | None:
    """The total that an index of weights names; None where it names none that can be meant."""
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    sane = isinstance(total, int) and not isinstance(total, bool) and 0 < total < 1 << 50
    return total if sane else None
