"""Which requests can go on with another engine, and how the other one is asked.

In comes a parsed request, out comes whether its stream may be continued, with the reason where it may not;
later, with the text that has been produced, the request that another engine gets. For a text completion
that is the prompt with the text behind it; for a chat, the conversation with an assistant's message that
vLLM goes on writing (`continue_final_message`). Limits on tokens shrink by what has been produced. Every
field of a request has to be known here: one that is not might mean something else on the second engine, so
such a request is not continued.
"""

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from router.metering.ask import CHAT_ROUTE, COMPLETIONS_ROUTE

# Engines whose chat goes on with a final message of the assistant.
CONTINUING_ENGINES = frozenset({"vllm", "vllm_ascend", "simulator"})


def _any(_: object) -> bool:
    return True


def _none(_: object) -> bool:
    return False


def _falsy(value: object) -> bool:
    return not value


def _one(value: object) -> bool:
    return value == 1


def _plain_text(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("type") == "text"


def _is_none_choice(value: object) -> bool:
    return value == "none"


# Field -> which of its values do not stand in the way; null never does.
_FIELDS: Mapping[str, Callable[[object], bool]] = {
    # What is asked, and what does not depend on the position in the answer.
    **dict.fromkeys(
        (
            *("model", "messages", "prompt", "stream", "stream_options", "user", "metadata", "store"),
            *("seed", "service_tier", "safety_identifier", "prompt_cache_key", "cache_salt", "priority"),
            *("request_id", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias"),
            *("bad_words", "stop", "stop_token_ids", "chat_template_kwargs"),
            *("skip_special_tokens", "spaces_between_special_tokens"),
            # These shrink.
            *("max_tokens", "max_completion_tokens", "min_tokens"),
        ),
        _any,
    ),
    # One choice, and nothing beside its text.
    **dict.fromkeys(("n", "best_of"), _one),
    **dict.fromkeys(("logprobs", "top_logprobs", "prompt_logprobs", "echo", "tools", "functions"), _falsy),
    **dict.fromkeys(("use_beam_search", "return_token_ids", "include_stop_str_in_output"), _falsy),
    # Ends that an engine ignores are not in the text: the second engine would not know of them.
    "ignore_eos": _falsy,
    **dict.fromkeys(("tool_choice", "function_call"), _is_none_choice),
    "parallel_tool_calls": _any,
    "response_format": _plain_text,
    # Engines count what was generated for these two, and the second would start counting at nothing.
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), _falsy),
    # The client goes on with a message of its own.
    "continue_final_message": _falsy,
    "add_generation_prompt": lambda value: value is True,
}


def obstacle(route: str, document: Mapping[str, Any], *, stream: bool) -> str:
    """Names what keeps a request from being continued; empty where nothing does."""
    if not stream:
        return "not a stream"
    if route not in (CHAT_ROUTE, COMPLETIONS_ROUTE):
        return "route"
    for name, value in document.items():
        if value is not None and not _FIELDS.get(name, _none)(value):
            return name[:64]
    wanted = "messages" if route == CHAT_ROUTE else "prompt"
    given = document.get(wanted)
    if not isinstance(given, list if route == CHAT_ROUTE else str):
        return wanted
    return ""


def tokens_max(document: Mapping[str, Any]) -> int | None:
    """Returns how many tokens the client wants at most; None for no limit of its own."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = document.get(name)
        if isinstance(value, int):
            return value
    return None


def continued_document(document: Mapping[str, Any], text: str, tokens: int) -> dict[str, Any]:
    """Makes the request that goes on behind a text.

    Args:
        document: The client's request, without an `obstacle`.
        text: What has been produced; empty begins anew.
        tokens: How many tokens that was.
    """
    made = dict(document)
    if text and "messages" in document:
        made["messages"] = [*document["messages"], {"role": "assistant", "content": text}]
        made |= {"continue_final_message": True, "add_generation_prompt": False}
    elif text:
        made["prompt"] = document["prompt"] + text
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(document.get(name), int):
            made[name] = document[name] - tokens
    if isinstance(document.get("min_tokens"), int):
        made["min_tokens"] = max(0, document["min_tokens"] - tokens)
    return made


def continued_body(document: Mapping[str, Any], text: str, tokens: int) -> bytes:
    """Makes that request as bytes."""
    return orjson.dumps(continued_document(document, text, tokens))
