"""The shapes of answers and stream chunks, as vLLM 0.32 writes them.

In: texts, counts and names. Out: dictionaries for JSON and bytes for server-sent events.
A chat stream is a role chunk with empty content, one chunk a token, a chunk with the finish
reason, a usage chunk without choices where asked for, and `[DONE]`; a text stream is the same
without the role chunk.
Must not: decide anything; these are the words, the routes say when.
"""

import json
from dataclasses import dataclass
from typing import Any

DONE = b"data: [DONE]\n\n"


def event(content: object) -> bytes:
    """One server-sent event."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "backslashreplace") + b"\n\n"


@dataclass(frozen=True)
class ResponseShape:
    """Writes everything that one completion answers.

    Attributes:
        chat: Whether it is a chat completion or a text completion.
        response_id: The id, with its `chatcmpl-` or `cmpl-` in front.
        created: Unix time in seconds.
        model: The first served name.
        prompt_tokens: Tokens of the prompt.
        prompt_tokens_details: Whether usage tells the cached tokens.
    """

    chat: bool
    response_id: str
    created: int
    model: str
    prompt_tokens: int
    prompt_tokens_details: bool

    def usage(self, completion_tokens: int, cached_tokens: int | None) -> dict[str, Any]:
        """The token counts; `cached_tokens` is told only where the engine was asked to."""
        details = None
        if self.prompt_tokens_details and cached_tokens is not None:
            details = {"cached_tokens": cached_tokens}
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": details,
        }

    def _envelope(self, *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def whole(
        self, text: str, finish_reason: str, completion_tokens: int, cached_tokens: int
    ) -> dict[str, Any]:
        """The answer without streaming."""
        choice: dict[str, Any] = {"index": 0}
        if self.chat:
            choice["message"] = {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [],
                "reasoning": None,
            }
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
        content = self._envelope(chunk=False)
        content |= {"choices": [choice], "service_tier": None, "system_fingerprint": None}
        content["usage"] = self.usage(completion_tokens, cached_tokens)
        content["kv_transfer_params"] = None
        return content

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        content = self._envelope(chunk=True)
        content["choices"] = choices
        if usage is not None:
            content["usage"] = usage
        return event(content)

    def role_chunk(self, usage: dict[str, Any] | None) -> bytes:
        """The first chunk of a chat."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk([choice], usage)

    def text_chunk(self, text: str, usage: dict[str, Any] | None) -> bytes:
        """A chunk with the text of one token."""
        return self._text_or_finish(text, None, usage)

    def finish_chunk(self, finish_reason: str, usage: dict[str, Any] | None) -> bytes:
        """The last chunk with a choice."""
        return self._text_or_finish("", finish_reason, usage)

    def _text_or_finish(self, text: str, finish_reason: str | None, usage: dict[str, Any] | None) -> bytes:
        choice: dict[str, Any] = {"index": 0}
        if self.chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": finish_reason}
        if finish_reason is not None or not self.chat:
            choice["stop_reason"] = None
        return self._chunk([choice], usage)

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices that `include_usage` asks for."""
        return self._chunk([], usage)
