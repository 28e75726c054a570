"""The other ways to ask the same model: OpenAI's responses, Anthropic's messages, scores and rankings.

In: bodies of `/v1/responses`, `/v1/messages` and the scoring routes. Out: the chat that each stands for,
checked by the same rules, and answers in vLLM 0.32's shapes. Responses are remembered, the last thousand of
them, so that they can be looked up and gone on from; nothing runs in the background. Must not: run the
engine; `api` does, and hands the pieces of text over.
"""

import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from nodeagent.engines.simulator import tokenizer
from nodeagent.engines.simulator.errors import RequestError, bad_request, validation_error
from nodeagent.engines.simulator.openai_requests import Body

RESPONSES_MAX: Final = 1000
_SCORE_DIGITS: Final = 6

# Text of one token each.
Pieces = AsyncGenerator[str, None]


@dataclass
class Told:
    """What the engine tells of an answer at its end.

    Attributes:
        finish_reason: `stop` or `length`.
        prompt_tokens: Of the prompt.
        completion_tokens: Produced.
        cached_tokens: Of the prompt, from the cache.
    """

    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


def named_event(content: dict[str, Any], write: Callable[[object], bytes]) -> bytes:
    """One server-sent event with its type as its name."""
    return f"event: {content['type']}\n".encode() + write(content)


def response_chat(body: Body, remembered: "Responses") -> Body:
    """The chat that a request for a response stands for.

    Raises:
        RequestError: The input has the wrong shape, or goes on from a response that is not known.
    """
    if body.get("background"):
        raise RequestError(
            400,
            "This vLLM engine does not support `store=True` and therefore does not support the "
            "background mode.",
            kind="invalid_request_error",
            parameter="background",
        )
    messages = list(remembered.messages(body.get("previous_response_id")))
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    given = body.get("input")
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list) and given:
        messages += given
    else:
        raise validation_error("input must be a string or a list of items", "input")
    return _chat(body, messages, body.get("max_output_tokens"))


def message_chat(body: Body) -> Body:
    """The chat that a request for a message stands for.

    Raises:
        RequestError: A field is missing.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise validation_error("[{'type': 'missing', 'loc': ('body', 'messages')}]", "messages")
    if body.get("system"):
        messages = [{"role": "system", "content": body["system"]}, *messages]
    return _chat(body, messages, body.get("max_tokens"))


def _chat(body: Body, messages: list[Any], max_tokens: Any) -> Body:
    chat: Body = {"messages": messages, "max_tokens": max_tokens}
    for name in ("model", "stream", "cache_salt", "ignore_eos"):
        if name in body:
            chat[name] = body[name]
    return chat


class Responses:
    """Writes responses, and remembers them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[dict[str, Any], list[Any]]] = OrderedDict()

    def messages(self, response_id: Any) -> list[Any]:
        """The conversation up to a response, itself included.

        Raises:
            RequestError: It is not known (404).
        """
        return [] if response_id is None else self._find(response_id)[1]

    def look_up(self, response_id: str) -> dict[str, Any]:
        """A remembered response.

        Raises:
            RequestError: It is not known (404).
        """
        return self._find(response_id)[0]

    def cancel(self, response_id: str) -> dict[str, Any]:
        """Refuses: what is remembered has ended.

        Raises:
            RequestError: Always (404, or 400 for a response that is known).
        """
        self._find(response_id)
        raise bad_request("Cannot cancel a synchronous response.", "response_id")

    def _find(self, response_id: Any) -> tuple[dict[str, Any], list[Any]]:
        found = self._kept.get(response_id) if isinstance(response_id, str) else None
        if found is None:
            raise RequestError(
                404, f"Response with id '{response_id}' not found.", kind="invalid_request_error",
                parameter="response_id",
            )  # fmt: skip
        return found

    def finished(self, document: dict[str, Any], chat: Body, text: str, told: Told) -> dict[str, Any]:
        """Completes a response with its text and usage, and remembers it."""
        whole = told.finish_reason == "stop"
        made = {
            **document,
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": [_output(document["id"], text)],
            "usage": {
                "input_tokens": told.prompt_tokens,
                "input_tokens_details": {"cached_tokens": told.cached_tokens},
                "output_tokens": told.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": told.prompt_tokens + told.completion_tokens,
            },
        }
        self._kept[document["id"]] = (made, [*chat["messages"], {"role": "assistant", "content": text}])
        if len(self._kept) > RESPONSES_MAX:
            self._kept.popitem(last=False)
        return made


def new_response(response_id: str, model: str, body: Body) -> dict[str, Any]:
    """A response that has just begun."""
    return {
        "id": response_id,
        "created_at": int(time.time()),
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": model,
        "object": "response",
        "output": [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": body.get("max_output_tokens"),
        "previous_response_id": body.get("previous_response_id"),
        "status": "in_progress",
        "usage": None,
    }


def _output(response_id: str, text: str) -> dict[str, Any]:
    return {
        "id": response_id.replace("resp_", "msg_"),
        "content": [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}],
        "role": "assistant",
        "status": "completed",
        "type": "message",
    }


async def response_events(
    document: dict[str, Any], chat: Body, pieces: Pieces, told: Told, remembered: Responses
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed response."""
    number = 0

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {**fields, "sequence_number": number - 1, "type": kind}

    message = _output(document["id"], "")
    place = {"output_index": 0, "item_id": message["id"], "content_index": 0}
    for kind in ("response.created", "response.in_progress"):
        yield event(kind, response=document)
    opened = {**message, "content": [], "status": "in_progress"}
    yield event("response.output_item.added", output_index=0, item=opened)
    yield event("response.content_part.added", **place, part=message["content"][0])
    texts = []
    async with aclosing(pieces):
        async for text in pieces:
            texts.append(text)
            yield event("response.output_text.delta", **place, delta=text, logprobs=[])
    made = remembered.finished(document, chat, "".join(texts), told)
    item = made["output"][0]
    yield event("response.output_text.done", **place, text="".join(texts), logprobs=[])
    yield event("response.content_part.done", **place, part=item["content"][0])
    yield event("response.output_item.done", output_index=0, item=item)
    yield event("response.completed", response=made)


def _message_usage(told: Told) -> dict[str, int]:
    return {
        "input_tokens": told.prompt_tokens - told.cached_tokens,
        "output_tokens": told.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": told.cached_tokens,
    }


def _stop_reason(told: Told) -> str:
    return "end_turn" if told.finish_reason == "stop" else "max_tokens"


def whole_message(message_id: str, model: str, text: str, told: Told) -> dict[str, Any]:
    """The answer to a request for a message."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": text}],
        "model": model,
        "stop_reason": _stop_reason(told),
        "usage": _message_usage(told),
    }


async def message_events(
    message_id: str, model: str, pieces: Pieces, told: Told
) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed message."""
    begun = whole_message(message_id, model, "", told)
    usage = {"input_tokens": told.prompt_tokens, "output_tokens": 0}
    begun |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    yield {"type": "message_start", "message": begun}
    yield {"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0}
    async with aclosing(pieces):
        async for text in pieces:
            yield {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}, "index": 0}
    yield {"type": "content_block_stop", "index": 0}
    delta = {"stop_reason": _stop_reason(told), "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": _message_usage(told)}
    yield {"type": "message_stop"}


def score_documents(query: str, documents: list[str]) -> list[float]:
    """How alike texts are: the cosine of their tokens' counts, 0 to 1."""
    asked = set(tokenizer.encode(query.lower()))
    scores = []
    for document in documents:
        given = set(tokenizer.encode(document.lower()))
        scores.append(len(asked & given) / math.sqrt(max(1, len(asked)) * max(1, len(given))))
    return [round(score, _SCORE_DIGITS) for score in scores]


def scoring_inputs(body: Body, query_name: str, documents_name: str) -> tuple[str, list[str]]:
    """The query and the documents of a scoring request.

    Raises:
        RequestError: One of them is missing or no text (400).
    """
    query, documents = body.get(query_name), body.get(documents_name)
    if isinstance(documents, str):
        documents = [documents]
    if not isinstance(query, str):
        raise validation_error(f"{query_name} must be a string", query_name)
    if not isinstance(documents, list) or not all(isinstance(each, str) for each in documents):
        raise validation_error(f"{documents_name} must be a list of strings", documents_name)
    return query, documents


def scoring_usage(query: str, documents: list[str]) -> dict[str, Any]:
    """Tokens of all pairs of the query and a document, as the model reads them."""
    query_tokens = len(tokenizer.encode(query))
    total = sum(query_tokens + len(tokenizer.encode(document)) for document in documents)
    return {
        "prompt_tokens": total,
        "total_tokens": total,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }


def ranking(body: Body, answer_id: str, model: str) -> dict[str, Any]:
    """The answer of the ranking routes: documents in the order of their scores.

    Raises:
        RequestError: The body has the wrong shape (400).
    """
    query, documents = scoring_inputs(body, "query", "documents")
    scores = score_documents(query, documents)
    order = sorted(range(len(documents)), key=lambda index: -scores[index])
    top = body.get("top_n")
    if isinstance(top, int) and top > 0:
        order = order[:top]
    results = [
        {"index": index, "document": {"text": documents[index]}, "relevance_score": scores[index]}
        for index in order
    ]
    return {
        "id": f"rerank-{answer_id}",
        "model": model,
        "usage": scoring_usage(query, documents),
        "results": results,
    }


def scoring(body: Body, answer_id: str, model: str) -> dict[str, Any]:
    """The answer of the scoring routes.

    Raises:
        RequestError: The body has the wrong shape (400).
    """
    names = ("text_1", "text_2") if "text_1" in body else ("queries", "documents")
    query, documents = scoring_inputs(body, *names)
    return {
        "id": f"score-{answer_id}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(score_documents(query, documents))
        ],
        "usage": scoring_usage(query, documents),
    }
