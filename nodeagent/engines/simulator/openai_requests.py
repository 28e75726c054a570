"""Reads the bodies of inference requests and refuses what vLLM refuses.

In: JSON bytes and the settings. Out: a `Generation` (what to run and how to answer), prompts for
the other routes, or a `RequestError` with vLLM's status and shape.
Must not: touch the engine, or answer by itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nodeagent.engines.simulator import tokenizer
from nodeagent.engines.simulator.engine_model import SequenceRequest
from nodeagent.engines.simulator.errors import (
    bad_request,
    context_overflow,
    model_not_found,
    too_many_characters,
    validation_error,
)
from nodeagent.engines.simulator.settings import LoraAdapter, SimulatorSettings
from nodeagent.engines.simulator.tokenizer import Echo

Body = dict[str, Any]
Adapters = Mapping[str, LoraAdapter]

_CHARACTERS_TO_ECHO = 1024


@dataclass(frozen=True)
class Generation:
    """A chat or text completion, checked.

    Attributes:
        request: For the engine.
        echo: The words of the answer.
        offset: How many of its tokens the prompt holds already, because the answer is being continued.
        stream: Whether to answer in chunks.
        include_usage: Whether usage is told at the end of a stream.
        continuous_usage: Whether it is told in every chunk.
        request_id: Of the body.
    """

    request: SequenceRequest
    echo: Echo
    offset: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    request_id: str | None

    def text(self, start: int, stop: int) -> str:
        """The text of the tokens generated from `start` up to, not including, `stop`."""
        return self.echo.text(self.offset + start, self.offset + stop)


def parse_body(headers: Mapping[str, str], body: bytes) -> Body:
    """The body's JSON object.

    Raises:
        RequestError: It is no JSON object, or is not declared as JSON (400).
    """
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise validation_error(
            "[{'type': 'value_error', 'loc': ('body',), 'msg': \"Unsupported Media Type: Only "
            "'application/json' is allowed\"}]"
        )
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise validation_error(
            f"[{{'type': 'json_invalid', 'loc': ('body',), 'msg': 'JSON decode error: {error}'}}]"
        ) from error
    if not isinstance(content, dict):
        raise validation_error(
            "[{'type': 'model_attributes_type', 'loc': ('body',), 'msg': 'Input should be a "
            "valid dictionary or object to extract fields from'}]"
        )
    return content


def _invalid(name: str, expected: str) -> Exception:
    return validation_error(
        f"[{{'type': 'invalid', 'loc': ('body', '{name}'), 'msg': 'Input should be {expected}'}}]",
        name,
    )


def _missing(name: str) -> Exception:
    return validation_error(
        f"[{{'type': 'missing', 'loc': ('body', '{name}'), 'msg': 'Field required'}}]", name
    )


def _integer(body: Body, name: str, minimum: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, "a valid integer")
    if value < minimum:
        raise bad_request(f"{name} must be at least {minimum}, got {value}.", name)
    return value


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _invalid(name, "a valid boolean")
    return value


def _string(body: Body, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _invalid(name, "a valid string")
    return value


def check_model(body: Body, settings: SimulatorSettings, adapters: Adapters) -> LoraAdapter | None:
    """The adapter that a request names, None for the model; a request without a name gets the model.

    Raises:
        RequestError: 404 for what is not served, or 400 if the name is no string.
    """
    model = _string(body, "model")
    if not model or model in settings.served_model_names:
        return None
    adapter = adapters.get(model)
    if adapter is None:
        raise model_not_found(model)
    return adapter


def data_parallel_rank(headers: Mapping[str, str], settings: SimulatorSettings) -> int | None:
    """The rank that a request's header names, None where it names none.

    Raises:
        RequestError: It is no rank of this engine (400).
    """
    text = headers.get("x-data-parallel-rank")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) >= settings.data_parallel_size:
        raise bad_request(
            f"data_parallel_rank {text} is out of range [0, {settings.data_parallel_size}).",
            "data_parallel_rank",
        )
    return int(text)


def _stream_options(body: Body, *, stream: bool) -> tuple[bool, bool]:
    options = body.get("stream_options")
    if options is None:
        return False, False
    if not isinstance(options, dict):
        raise _invalid("stream_options", "a valid dictionary")
    if not stream:
        raise validation_error("Stream options can only be defined when `stream=True`.", "stream_options")
    return _boolean(options, "include_usage"), _boolean(options, "continuous_usage_stats")


def _check_characters(characters: int, settings: SimulatorSettings) -> None:
    limit_tokens = settings.limits.max_model_length_tokens
    limit = limit_tokens * tokenizer.MAX_CHARACTERS_PER_TOKEN
    if characters > limit:
        raise too_many_characters(limit_tokens, characters, limit)


def chat_echo(body: Body, text: str) -> tuple[Echo, int]:
    """The answer to a chat whose last user message is `text`, and how much of it is in the chat already."""
    echo = Echo(text)
    last = body["messages"][-1]
    if body.get("continue_final_message") is not True or last["role"] != "assistant":
        return echo, 0
    return echo, echo.offset_behind(tokenizer.content_text(last.get("content")))


def chat_prompt(body: Body, settings: SimulatorSettings) -> tuple[list[int], str]:
    """The ids of a chat's prompt and the text of its last user message.

    Raises:
        RequestError: The messages have the wrong shape, or are far too long (400).
    """
    messages = body.get("messages")
    if messages is None:
        raise _missing("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", "a list with at least one message")
    characters = 0
    last = ""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _invalid("messages", "a list of messages with a role")
        try:
            text = tokenizer.content_text(message.get("content"))
        except TypeError as error:
            raise bad_request(str(error), "messages") from error
        characters += len(text)
        if message["role"] == "user":
            last = text
    _check_characters(characters, settings)
    continues = _boolean(body, "continue_final_message")
    if continues and _boolean(body, "add_generation_prompt"):
        raise validation_error(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            "continue_final_message",
        )
    token_ids = tokenizer.render_chat(
        messages,
        tools=body.get("tools"),
        add_generation_prompt=body.get("add_generation_prompt") is not False,
        continue_final_message=continues,
    )
    return token_ids, last


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def text_prompt(prompt: Any, name: str, settings: SimulatorSettings) -> tuple[list[int], str]:
    """The ids and the text of one prompt, given as text or as ids.

    Raises:
        RequestError: It is neither, or far too long (400).
    """
    if isinstance(prompt, str):
        _check_characters(len(prompt), settings)
        return tokenizer.encode(prompt), prompt
    if _is_token_list(prompt):
        return list(prompt), tokenizer.decode(prompt[-_CHARACTERS_TO_ECHO:])
    raise _invalid(name, "a string or a list of token ids")


def _output(body: Body, settings: SimulatorSettings, prompt_tokens: int, offset: int) -> tuple[int, str]:
    """How many tokens to generate and the reason for stopping there; `offset` of them are there already."""
    limit = settings.limits.max_model_length_tokens
    if prompt_tokens >= limit:
        raise context_overflow(limit, prompt_tokens)
    max_tokens = requested_tokens(body)
    minimum = _integer(body, "min_tokens", 0) or 0
    if max_tokens is not None and max_tokens > limit:
        raise bad_request(
            f"max_tokens={max_tokens} cannot be greater than max_model_len=max_total_tokens="
            f"{limit}. Please request fewer output tokens.",
            "max_tokens",
        )
    if max_tokens is not None and minimum > max_tokens:
        raise bad_request(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {minimum}.",
            "min_tokens",
        )
    room = limit - prompt_tokens
    if max_tokens is not None:
        return min(max_tokens, room), "length"
    if _boolean(body, "ignore_eos"):
        return room, "length"
    wanted = max(settings.default_output_tokens - offset, minimum, 1)
    return (wanted, "stop") if wanted <= room else (room, "length")


def requested_tokens(body: Body) -> int | None:
    """The output limit that the client asked for; `max_completion_tokens` is the newer name."""
    newer = _integer(body, "max_completion_tokens", 1)
    return newer if newer is not None else _integer(body, "max_tokens", 1)


def parse_generation(
    body: Body, settings: SimulatorSettings, adapters: Adapters, *, chat: bool
) -> Generation:
    """Checks a chat completion (`chat`) or a text completion.

    Raises:
        RequestError: 404 for the model, 400 for anything else that vLLM refuses.
    """
    stream = _boolean(body, "stream")
    include_usage, continuous_usage = _stream_options(body, stream=stream)
    cache_salt = _string(body, "cache_salt")
    if cache_salt == "":
        raise validation_error("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt")
    count = _integer(body, "n", 1)
    if count not in {None, 1}:
        raise bad_request("The simulator generates one choice: n must be 1.", "n")
    lora = check_model(body, settings, adapters)
    read_prompt = chat_prompt if chat else _completion_prompt
    token_ids, text = read_prompt(body, settings)
    echo, offset = chat_echo(body, text) if chat else tokenizer.echo_behind(text)
    output_tokens, finish_reason = _output(body, settings, len(token_ids), offset)
    request = SequenceRequest(
        prompt_token_ids=token_ids,
        output_tokens=output_tokens,
        finish_reason=finish_reason,
        output_token_id=lambda index: echo.token_id(offset + index),
        cache_salt=cache_salt,
        max_tokens=requested_tokens(body),
        lora=lora,
    )
    request_id = _string(body, "request_id")
    return Generation(request, echo, offset, stream, include_usage, continuous_usage, request_id)


def _completion_prompt(body: Body, settings: SimulatorSettings) -> tuple[list[int], str]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not _is_token_list(prompt):
        prompt = prompt[0]
    if prompt is None or prompt in ("", []):
        raise validation_error("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    return text_prompt(prompt, "prompt", settings)


def parse_embedding_inputs(body: Body, settings: SimulatorSettings, adapters: Adapters) -> list[list[int]]:
    """The ids of every input of an embedding request.

    Raises:
        RequestError: 404 for the model, 400 for inputs that are missing, misshapen or too long.
    """
    inputs = body.get("input")
    if inputs is None:
        raise _missing("input")
    if isinstance(inputs, str) or (_is_token_list(inputs) and inputs):
        inputs = [inputs]
    if not isinstance(inputs, list) or not inputs:
        raise _invalid("input", "a string, a list of strings or lists of token ids")
    check_model(body, settings, adapters)
    limit = settings.limits.max_model_length_tokens
    token_lists = [text_prompt(item, "input", settings)[0] for item in inputs]
    for token_ids in token_lists:
        if len(token_ids) > limit:
            raise context_overflow(limit, len(token_ids))
    return token_lists
