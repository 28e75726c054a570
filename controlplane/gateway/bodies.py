"""Request bodies and queries, read strictly: every mistake named, with its path and the nearest name.

In come bytes, out come schema models. Malformed JSON is answered with the position, unknown fields with
the field that was probably meant.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from core.errors import FieldViolation, InvalidArgument

Model = TypeVar("Model", bound=BaseModel)

# Parsed values nest at most this deep: beyond, the parser's own stack is at stake.
_DEPTH_MAX = 32


def parse_body(raw: bytes, model: type[Model]) -> Model:
    """Reads a JSON body.

    Raises:
        InvalidArgument: With every wrong field, or the position of malformed JSON.
    """
    content = _parse_json(raw)
    if not isinstance(content, dict):
        raise InvalidArgument.of("body", f"is {_kind(content)}; a JSON object is expected")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        violations = [_violation(model, each) for each in error.errors(include_url=False)]
        raise InvalidArgument(violations) from error


def query_of(query: Mapping[str, str], allowed: Sequence[str]) -> dict[str, str]:
    """Checks the names of query parameters.

    Raises:
        InvalidArgument: One is not known.
    """
    unknown = [name for name in query if name not in allowed]
    if unknown:
        raise InvalidArgument([FieldViolation(name, _unknown(name, allowed)) for name in unknown])
    return dict(query)


def integer_of(query: Mapping[str, str], name: str) -> int:
    """Reads a whole number; 0 where it is absent.

    Raises:
        InvalidArgument: It is none.
    """
    text = query.get(name, "0")
    if not text.removeprefix("-").isdecimal() or not text.isascii() or len(text) > 10:
        raise InvalidArgument.of(name, f"`{text[:40]}` is no whole number")
    value = int(text)
    if abs(value) > 2**31 - 1:
        raise InvalidArgument.of(name, f"`{text}` is out of range")
    return value


def flag_of(query: Mapping[str, str], name: str) -> bool:
    """Reads `true` or `false`; False where it is absent.

    Raises:
        InvalidArgument: It is neither.
    """
    text = query.get(name, "false")
    if text not in {"true", "false"}:
        raise InvalidArgument.of(name, f"`{text[:40]}` is neither `true` nor `false`")
    return text == "true"


def _parse_json(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument.of("body", f"is not UTF-8 at byte {error.start}") from error
    if not text.strip():
        raise InvalidArgument.of("body", "is empty; a JSON object is expected")
    try:
        content = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
        # Escaped halves of surrogate pairs are JSON, but no text.
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise InvalidArgument.of(
            "body", f"malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except UnicodeEncodeError as error:
        raise InvalidArgument.of("body", "holds text with half a surrogate pair") from error
    except RecursionError as error:
        raise InvalidArgument.of("body", "nests too deep") from error
    except ValueError as error:
        raise InvalidArgument.of("body", str(error)[:200]) from error
    if _deeper_than(content, _DEPTH_MAX):
        raise InvalidArgument.of("body", f"nests deeper than {_DEPTH_MAX} levels")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"`{name[:80]}` stands twice in one object; keep one")
        content[name] = value
    return content


def _deeper_than(value: Any, levels: int) -> bool:
    children: Iterable[Any] = ()
    if isinstance(value, dict):
        children = value.values()
    elif isinstance(value, list):
        children = value
    else:
        return False
    return levels == 0 or any(_deeper_than(child, levels - 1) for child in children)


def _violation(model: type[BaseModel], error: Any) -> FieldViolation:
    location: tuple[int | str, ...] = error["loc"]
    given, kind, context = error.get("input"), error["type"], error.get("ctx", {})
    match kind:
        case "extra_forbidden":
            description = _unknown(str(location[-1]), _fields_at(model, location[:-1]))
        case "missing":
            description = "is missing; it is required"
        case "literal_error":
            description = f"`{str(given)[:80]}` is not allowed; use {context['expected']}"
        case "greater_than_equal":
            description = f"{str(given)[:40]} is too small; give at least {context['ge']}"
        case "less_than_equal":
            description = f"{str(given)[:40]} is too large; give at most {context['le']}"
        case "too_short":
            description = "is empty; give at least one entry"
        case "too_long":
            description = f"has more than {context['max_length']} entries; split the request"
        case _ if kind.endswith("_type"):
            description = f"is {_kind(given)}; {_expected(kind)} is expected"
        case _:
            description = str(error["msg"])
    return FieldViolation(_path(location), description)


def _path(location: Sequence[int | str]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part[:80]}" if path else part[:80]
    return path


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> tuple[str, ...]:
    """Names of the fields of the object that a location leads to."""
    current: type[BaseModel] = model
    for part in location:
        if isinstance(part, str) and part in current.model_fields:
            current = _model_in(current.model_fields[part].annotation) or current
    return tuple(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation speaks of, in a list or beside None too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(each) for each in getattr(annotation, "__args__", ()))
    return next((each for each in found if each is not None), None)


def _unknown(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    meant = f"did you mean `{nearest[0]}`? " if nearest else ""
    return f"is not known; {meant}known are {', '.join(known)}"


def _kind(value: Any) -> str:
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number with a fraction or exponent"),
        (str, "text"),
        (list, "an array"),
        (dict, "an object"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _expected(kind: str) -> str:
    return {
        "int_type": "a whole number",
        "string_type": "text",
        "list_type": "an array",
        "dict_type": "an object",
        "bool_type": "true or false",
        "model_type": "an object",
    }.get(kind, "another type")
