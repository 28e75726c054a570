"""Asks engines for usage in every stream, without changing any other byte of the request.

In come a body and what has been parsed of it, out comes the same body with `stream_options` that ask for
usage, and what the client itself had asked for: what it had not is taken out of the answer again
(`metering.stream`). Only what streams, and only on routes and engines that know the option: others would
refuse it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from router.openai.body import replace_member

CHAT_ROUTE = "/v1/chat/completions"
COMPLETIONS_ROUTE = "/v1/completions"
_ROUTES = frozenset({CHAT_ROUTE, COMPLETIONS_ROUTE})

_OPTIONS = "stream_options"
_USAGE = "include_usage"
_CONTINUOUS = "continuous_usage_stats"


# A constructor of its own is compiled with the rest, unlike the one that `dataclass` writes.
@dataclass(init=False, slots=True)
class Asked:
    """What a client wants to see of the usage of a stream.

    Attributes:
        usage: It asked for the usage chunk at the end.
        continuous: It asked for usage in every chunk.
        choices: How many choices one prompt has (`n`).
        prompts: How many prompts it sent; None where only the engine can tell.
        readable: The router may ask on the client's behalf; False where the options have a shape that only
            the engine can judge, and nothing is changed.
    """

    usage: Final[bool]
    continuous: Final[bool]
    choices: Final[int]
    prompts: Final[int | None]
    readable: Final[bool]

    def __init__(
        self,
        *,
        usage: bool = False,
        continuous: bool = False,
        choices: int = 1,
        prompts: int | None = 1,
        readable: bool = True,
    ) -> None:
        self.usage = usage
        self.continuous = continuous
        self.choices = choices
        self.prompts = prompts
        self.readable = readable

    @property
    def single(self) -> bool:
        """The answer has one choice only."""
        return self.choices == 1 and self.prompts == 1


# What most streams ask for.
_NOTHING: Final = Asked()


def read_asked(route: str, document: Mapping[str, Any]) -> Asked | None:
    """Reads what a client wants of a stream; None on routes that do not know the option."""
    if route not in _ROUTES:
        return None
    options = document.get(_OPTIONS)
    # vLLM answers a beam search in one event that tells its usage in any case.
    whole = route == COMPLETIONS_ROUTE and document.get("use_beam_search") is True
    count = document.get("n")
    choices = count if isinstance(count, int) and count > 0 else 1
    prompts = 1 if route == CHAT_ROUTE else _prompts(document.get("prompt"))
    if options is None:
        if choices == 1 and prompts == 1 and not whole:
            return _NOTHING
        return Asked(choices=choices, prompts=prompts, readable=not whole)
    if whole or not isinstance(options, dict):
        return Asked(choices=choices, prompts=prompts, readable=False)
    usage, continuous = options.get(_USAGE), options.get(_CONTINUOUS)
    readable = all(value is None or isinstance(value, bool) for value in (usage, continuous))
    # Engines give continuous usage only together with the chunk at the end.
    return Asked(
        usage=usage is True,
        continuous=usage is True and continuous is True,
        choices=choices,
        prompts=prompts,
        readable=readable,
    )


def ask_usage(body: bytes, document: Mapping[str, Any], *, continuous: bool) -> bytes:
    """Makes a body ask for usage.

    Args:
        body: A JSON object, as bytes, that is not empty.
        document: The same, parsed; its options must be readable (`Asked.readable`).
        continuous: Ask for usage in every chunk, too.

    Raises:
        Refusal: Nested too deeply to be walked.
    """
    if _OPTIONS not in document:
        if body.endswith(b"}"):
            return body[:-1] + (_ENDING_CONTINUOUS if continuous else _ENDING)
        text = body.rstrip(b" \t\r\n")
        return text[:-1] + (_INSERT_CONTINUOUS if continuous else _INSERT) + body[len(text) - 1 :]
    options = document[_OPTIONS] or {}
    wanted = {_USAGE: True, _CONTINUOUS: True} if continuous else {_USAGE: True}
    if all(options.get(name) is True for name in wanted):
        return body
    return replace_member(body, _OPTIONS, orjson.dumps({**options, **wanted}))


_INSERT: Final = b',"stream_options":{"include_usage":true}'
_INSERT_CONTINUOUS: Final = b',"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
_ENDING: Final = _INSERT + b"}"
_ENDING_CONTINUOUS: Final = _INSERT_CONTINUOUS + b"}"


def _prompts(prompt: object) -> int | None:
    """Counts the prompts of a completion: a text, a list of token ids, or a list of either."""
    if not isinstance(prompt, list):
        return 1 if isinstance(prompt, str) else None
    if not prompt or isinstance(prompt[0], int):
        return 1
    return len(prompt)
