"""Declarations as files: JSON exactly as the gateway takes it, or YAML of the same shape.

In comes text, out come checked documents; a syntax error names file and line, a wrong field names file
and path. Relative model paths (`./...`, `../...`) are resolved against the file's folder. Names, sizes
and whether a model exists are the server's to judge. Nothing here talks to a server.
"""

import difflib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millrace_client.cli.placement import placement_message, placement_problems
from millrace_client.errors import FieldViolation, InvalidArgument

if TYPE_CHECKING:
    from millrace.core.v1.policy_pb2 import Autoscale, Rollout, Routing
    from millrace.scheduler.v1.scheduler_service_pb2 import DeclaredModel

STDIN = "-"
# A declaration of the allowed hundred models takes a few dozen kilobytes.
FILE_BYTES_MAX = 1024 * 1024
# YAML aliases can unfold a small file into billions of values.
VALUES_MAX = 20_000
DEPTH_MAX = 32
VIOLATIONS_SHOWN_MAX = 5
INT32_MAX = 2**31 - 1

DOCUMENT_FIELDS = ("models", "namespace", "metadata")
MODEL_FIELDS = (
    "name",
    "model",
    "engine",
    "quantization",
    "max_model_len",
    "replicas",
    "extra_args",
    "rollout",
    "autoscale",
    "priority",
    "placement",
    "routing",
)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry of `models`. None means that the file does not say."""

    name: str
    model: str
    engine: str | None
    quantization: str | None
    max_model_len: int | None
    replicas: int | None
    extra_args: dict[str, Any]
    rollout: "Rollout | None" = None
    autoscale: "Autoscale | None" = None
    priority: int | None = None
    placement: dict[str, Any] | None = None
    routing: "Routing | None" = None

    def message(self) -> "DeclaredModel":
        """Returns the entry as the contract has it."""
        from google.protobuf.struct_pb2 import Struct
        from millrace.scheduler.v1.scheduler_service_pb2 import DeclaredModel

        declared = DeclaredModel(
            name=self.name,
            model=self.model,
            engine=enum_number("engine", self.engine),  # type: ignore[arg-type]
            quantization=enum_number("quantization", self.quantization),  # type: ignore[arg-type]
            max_model_len=self.max_model_len,
            replicas=self.replicas,
            rollout=self.rollout,
            autoscale=self.autoscale,
            priority=self.priority,
            routing=self.routing,
        )
        if self.placement is not None:
            declared.placement.CopyFrom(placement_message(self.placement))
        if self.extra_args:
            arguments = Struct()
            arguments.update(self.extra_args)
            declared.extra_args.CopyFrom(arguments)
        return declared


@dataclass(frozen=True, slots=True)
class Document:
    """One declaration.

    Attributes:
        source: File name for messages.
        namespace: Tenant; empty where the file does not say.
        metadata: The caller's own labels; None where the file does not say.
        models: At least one.
    """

    source: str
    namespace: str
    metadata: dict[str, Any] | None
    models: tuple[ModelEntry, ...]


def enum_choices(field: str) -> tuple[str, ...]:
    """Returns the spellings of `engine` or `quantization`."""
    return tuple(_enum_numbers(field))


def enum_number(field: str, spelling: str | None) -> int:
    """Returns the enum value of a spelling; 0 for None."""
    return 0 if spelling is None else _enum_numbers(field)[spelling]


def _enum_numbers(field: str) -> dict[str, int]:
    from millrace.core.v1 import types_pb2

    enum = types_pb2.Engine if field == "engine" else types_pb2.Quantization
    prefix = "ENGINE_" if field == "engine" else "QUANTIZATION_"
    return {
        name.removeprefix(prefix).lower().replace("_", "-"): number
        for name, number in enum.items()
        if number != 0
    }


def read_documents(files: Sequence[str]) -> list[Document]:
    """Reads and checks every document of every file; `-` is stdin.

    Raises:
        InvalidArgument: A file cannot be read or is wrong; nothing has been declared then.
    """
    documents: list[Document] = []
    for name in files:
        if name == STDIN:
            text, source, folder = (
                _decode(sys.stdin.buffer.read(FILE_BYTES_MAX + 1), "stdin"),
                "stdin",
                Path.cwd(),
            )
        else:
            path = Path(name)
            try:
                with path.open("rb") as file:
                    text = _decode(file.read(FILE_BYTES_MAX + 1), name)
            except OSError as error:
                raise InvalidArgument(f"cannot read {name}: {error.strerror}") from error
            source, folder = name, path.parent
        documents.extend(parse_documents(text, source=source, folder=folder))
    seen: dict[tuple[str, str], str] = {}
    for document in documents:
        for entry in document.models:
            first = seen.setdefault((document.namespace, entry.name), document.source)
            if first != document.source:
                raise InvalidArgument(f"{document.source}: `{entry.name}` is also declared in {first}")
    return documents


def parse_documents(text: str, *, source: str, folder: Path) -> list[Document]:
    """Parses a text that holds one JSON document, or one or more YAML documents.

    Raises:
        InvalidArgument: The text is wrong; the message names the line or the fields.
    """
    as_json = source.endswith(".json") or (
        not source.endswith((".yaml", ".yml")) and text.lstrip()[:1] in {"{", "["}
    )
    values = [_parse_json(text, source)] if as_json else _parse_yaml(text, source)
    if not values:
        raise InvalidArgument(f"{source} is empty: write a declaration with `models`")
    return [_Checker(source, folder).document(value) for value in values]


def _decode(content: bytes, source: str) -> str:
    if len(content) > FILE_BYTES_MAX:
        raise InvalidArgument(f"{source} is larger than {FILE_BYTES_MAX} bytes: is it the right file?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{source} is not UTF-8 text (byte {error.start}): is it the right file?"
        ) from error


class _DuplicateKey(Exception):
    """A JSON object names a field twice."""


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for key, value in pairs:
        if key in built:
            raise _DuplicateKey(key)
        built[key] = value
    return built


def _parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_object)
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"{source}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}"
        ) from error
    except _DuplicateKey as error:
        raise InvalidArgument(f"{source}: the field `{error}` stands twice in one object") from error
    except RecursionError as error:
        raise InvalidArgument(f"{source}: nested too deeply") from error


def _parse_yaml(text: str, source: str) -> list[Any]:
    import yaml

    try:
        return [value for value in yaml.safe_load_all(text) if value is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise InvalidArgument(f"{source}{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a scalar that looks like a date and is none.
        raise InvalidArgument(f"{source}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise InvalidArgument(f"{source}: nested too deeply") from error


class _Checker:
    """Checks one document and collects every violation, so that a user mends them all at once."""

    def __init__(self, source: str, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._violations: list[FieldViolation] = []
        self._values = 0

    def document(self, value: Any) -> Document:
        if not isinstance(value, dict):
            raise InvalidArgument(
                f'{self._source}: a declaration is an object: {{"models": [{{"name": ..., "model": ...}}]}}'
            )
        if "models" not in value and "model" in value:
            raise InvalidArgument(
                f'{self._source}: models: is missing: write {{"models": [...]}} around the entry',
                violations=[FieldViolation("models", "is missing")],
            )
        self._unknown_fields(value, DOCUMENT_FIELDS, "")
        namespace = self._optional_text(value, "namespace", "")
        metadata = self._object(value, "metadata", "") if value.get("metadata") is not None else None
        models = self._models(value.get("models"))
        if self._violations:
            shown = self._violations[:VIOLATIONS_SHOWN_MAX]
            more = len(self._violations) - len(shown)
            text = "; ".join(f"{each.field}: {each.description}" for each in shown)
            raise InvalidArgument(
                f"{self._source}: {text}" + (f"; and {more} more" if more else ""),
                reason="ERROR_REASON_FIELD_INVALID",
                violations=self._violations,
            )
        return Document(self._source, namespace or "", metadata, tuple(models))

    def _wrong(self, field: str, description: str) -> None:
        self._violations.append(FieldViolation(field, description))

    def _unknown_fields(self, value: dict[Any, Any], known: Sequence[str], prefix: str) -> None:
        for field in value:
            if field in known:
                continue
            close = difflib.get_close_matches(str(field), known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(known)}"
            self._wrong(f"{prefix}{field}", f"unknown field, {hint}")

    def _models(self, value: Any) -> list[ModelEntry]:
        if not isinstance(value, list) or not value:
            self._wrong("models", 'needs at least one entry: [{"name": ..., "model": ...}]')
            return []
        entries: list[ModelEntry] = []
        names: dict[str, int] = {}
        for position, each in enumerate(value):
            prefix = f"models[{position}]."
            if not isinstance(each, dict):
                self._wrong(f"models[{position}]", "has to be an object with `name` and `model`")
                continue
            entry = self._entry(each, prefix)
            first = names.setdefault(entry.name, position)
            if entry.name and first != position:
                self._wrong(f"{prefix}name", f"`{entry.name}` is also the name of models[{first}]")
            entries.append(entry)
        return entries

    def _entry(self, value: dict[Any, Any], prefix: str) -> ModelEntry:
        self._unknown_fields(value, MODEL_FIELDS, prefix)
        return ModelEntry(
            name=self._required_text(value, "name", prefix),
            model=self._model_path(self._required_text(value, "model", prefix)),
            engine=self._choice(value, "engine", prefix),
            quantization=self._choice(value, "quantization", prefix),
            max_model_len=self._integer(value, "max_model_len", prefix, minimum=1),
            replicas=self._integer(value, "replicas", prefix, minimum=0),
            extra_args=self._object(value, "extra_args", prefix),
            rollout=self._policy(value, "rollout", prefix),
            autoscale=self._policy(value, "autoscale", prefix),
            priority=self._integer(value, "priority", prefix, minimum=1),
            placement=self._placement(value, prefix),
            routing=self._policy(value, "routing", prefix),
        )

    def _policy(self, value: dict[Any, Any], field: str, prefix: str) -> Any:
        if value.get(field) is None or not self._plain(value[field], prefix + field, depth=0):
            return None
        from millrace_client.cli.policies import KINDS, read_policy

        return read_policy(value[field], KINDS[field], prefix + field, self._wrong)

    def _placement(self, value: dict[Any, Any], prefix: str) -> dict[str, Any] | None:
        """Checks the shape of a placement; what its labels and devices mean is the server's to judge."""
        if value.get("placement") is None:
            return None
        found = self._object(value, "placement", prefix)
        before = len(self._violations)
        for field, description in placement_problems(found, f"{prefix}placement"):
            self._wrong(field, description)
        return found if len(self._violations) == before else None

    def _required_text(self, value: dict[Any, Any], field: str, prefix: str) -> str:
        found = value.get(field)
        if isinstance(found, str) and found.strip():
            return found
        self._wrong(prefix + field, "is missing" if found is None else "has to be a text that is not empty")
        return ""

    def _optional_text(self, value: dict[Any, Any], field: str, prefix: str) -> str | None:
        found = value.get(field)
        if found is None or isinstance(found, str):
            return found
        self._wrong(prefix + field, "has to be a text (put it in quotes)")
        return None

    def _choice(self, value: dict[Any, Any], field: str, prefix: str) -> str | None:
        found = value.get(field)
        if found is None:
            return None
        choices = enum_choices(field)
        if isinstance(found, str) and found in choices:
            return found
        self._wrong(prefix + field, f"`{found}` is unknown, it is one of {', '.join(choices)}")
        return None

    def _integer(self, value: dict[Any, Any], field: str, prefix: str, *, minimum: int) -> int | None:
        found = value.get(field)
        if found is None:
            return None
        if isinstance(found, int) and not isinstance(found, bool) and minimum <= found <= INT32_MAX:
            return found
        self._wrong(prefix + field, f"has to be a whole number of at least {minimum}, not `{found}`")
        return None

    def _object(self, value: dict[Any, Any], field: str, prefix: str) -> dict[str, Any]:
        found = value.get(field)
        if found is None:
            return {}
        if not isinstance(found, dict):
            self._wrong(prefix + field, "has to be an object")
            return {}
        return found if self._plain(found, prefix + field, depth=0) else {}

    def _plain(self, value: Any, path: str, *, depth: int) -> bool:
        """Checks that a value can travel as JSON."""
        self._values += 1
        if self._values > VALUES_MAX or depth > DEPTH_MAX:
            self._wrong(path, f"holds more than {VALUES_MAX} values, or is nested deeper than {DEPTH_MAX}")
            return False
        children: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            wrong = next((key for key in value if not isinstance(key, str)), None)
            if wrong is not None:
                self._wrong(f"{path}.{wrong}", "a field name has to be a text (put it in quotes)")
                return False
            children = [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            children = [(f"{path}[{position}]", inner) for position, inner in enumerate(value)]
        elif not _is_scalar(value):
            self._wrong(path, f"`{value}` is no JSON value (put it in quotes)")
            return False
        return all(self._plain(inner, inner_path, depth=depth + 1) for inner_path, inner in children)

    def _model_path(self, model: str) -> str:
        """Makes a path that begins with a dot absolute; a hub id and an absolute path stay as they are."""
        if model in {".", ".."} or model.startswith(("./", "../")):
            return str((self._folder / model).resolve())
        return model


def _is_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool | int)
