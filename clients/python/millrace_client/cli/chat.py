"""`millrace chat`: talk to a deployment through the router, as any OpenAI client would.

In comes a message, or a person; out come tokens as they arrive. Ctrl-C ends the answer that is being
written, and a second one leaves. The key is sent to the router of the context and shown nowhere.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millrace_client import errors
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    import httpx

    from millrace_client.context import Context

CONNECT_TIMEOUT_SECONDS = 5.0
# The first token may wait for a long prompt on a slow machine; the router gives up at this point too.
READ_TIMEOUT_SECONDS = 120.0
# A piped message beyond this is no chat message.
STDIN_CHARACTERS_MAX = 1_000_000
ERROR_CHARACTERS_MAX = 500


@dataclass(slots=True)
class Answer:
    """What came back, perhaps not to its end."""

    text: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] | None = None


@dataclass(slots=True)
class Conversation:
    """A chat with its history and settings."""

    client: "httpx.Client"
    url: str
    model: str
    temperature: float | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, message: str) -> Iterator[Answer]:
        """Sends a message and yields the answer as it grows; keeps both in the history.

        Raises:
            MillraceError: The router refuses, cannot be reached, or breaks off.
        """
        import httpx

        self.messages.append({"role": "user", "content": message})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        answer = Answer()
        try:
            with self.client.stream("POST", self.url, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise _refusal(response, self.model)
                for chunk in _server_sent(response.iter_lines()):
                    if _take(answer, chunk):
                        yield answer
        except httpx.TimeoutException as error:
            raise errors.DeadlineExceeded(f"no answer from {self.url} in time") from error
        except httpx.TransportError as error:
            if answer.text:
                raise errors.Unavailable(f"the answer broke off: {error}") from error
            raise errors.Unavailable(f"cannot reach the router at {self.url}: {error}") from error
        finally:
            if answer.text:
                # What was cut short still belongs to the conversation.
                self.messages.append({"role": "assistant", "content": answer.text})
            else:
                self.messages.pop()
        yield answer


@command
def chat(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(help="Deployment; the one of `make up` where none is given.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("-m", "--message", help="Ask this, print the answer and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", metavar="TEXT")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is the most likely answer; the engine's default if unset.", min=0, max=2),
    ] = None,
    router_url: Annotated[str | None, typer.Option(help="Router, http://host:8080.", metavar="URL")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File that holds the API key.", metavar="FILE")
    ] = None,
) -> None:
    """Talk to a deployment.

    Examples:
      millrace chat qwen                        a conversation; Ctrl-D leaves
      millrace chat qwen -m "What is Millrace?" --temperature 0
      git diff | millrace chat qwen --system "Review this change."

    Ctrl-C ends the answer, twice leaves. The key comes from --api-key-file, MILLRACE_API_KEY or
    .millrace/local.json.
    """
    context = session.resolve(router_url=router_url, api_key_file=api_key_file)
    url = context.require_router_url() + "/v1/chat/completions"
    key = context.require_api_key()
    # The key decides the namespace: `namespace/name` is accepted as everywhere, and only the name is sent.
    model = (name or context.deployment).rpartition("/")[2]
    if not model:
        raise errors.ContextError("which deployment? Write `millrace chat NAME`")
    interactive = message is None and sys.stdin.isatty()
    if message is None and not interactive:
        message = sys.stdin.read(STDIN_CHARACTERS_MAX).strip()
        if not message:
            raise errors.InvalidArgument("no message: give -m MESSAGE, or write it to stdin")
    with _http_client(session, context, key) as client:
        conversation = Conversation(client, url, model, temperature)
        if system:
            conversation.messages.append({"role": "system", "content": system})
        if message is None:
            _converse(session, conversation)
        else:
            _ask_once(session, conversation, message)


def _http_client(session: Session, context: "Context", key: str) -> "httpx.Client":
    from urllib.parse import urlsplit

    import httpx

    host = urlsplit(context.require_router_url()).hostname or ""
    timeout = httpx.Timeout(session.options.timeout or READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)
    # A proxy of the environment cannot reach this machine.
    local = host in {"localhost", "::1"} or host.startswith("127.")
    return httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=timeout, trust_env=not local)


def _ask_once(session: Session, conversation: Conversation, message: str) -> None:
    answer = Answer()
    written = 0
    for answer in conversation.ask(message):
        if not session.structured:
            written = _write_new(answer, written)
    if session.structured:
        session.emit(
            {
                "model": conversation.model,
                "content": answer.text,
                "finish_reason": answer.finish_reason,
                "usage": answer.usage,
            }
        )
    else:
        session.write("" if answer.text.endswith("\n") else "\n")


def _converse(session: Session, conversation: Conversation) -> None:
    """Talks until Ctrl-D, /exit, or two Ctrl-C in a row."""
    session.note(f"Talking to {conversation.model}. Ctrl-C ends an answer, twice leaves; Ctrl-D leaves.")
    interrupted = False
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            session.note("")
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            session.note("\n(Ctrl-C again leaves)")
            continue
        interrupted = False
        if line == "/exit":
            return
        if not line:
            continue
        written = 0
        try:
            for answer in conversation.ask(line):
                written = _write_new(answer, written)
            session.write("\n")
        except KeyboardInterrupt:
            interrupted = True
            session.note("\n(ended; Ctrl-C again leaves)")
        except errors.MillraceError as error:
            from millrace_client.cli import describe_error

            # A conversation outlives a refused question.
            session.note(f"error: {describe_error(error)[1]}")


def _write_new(answer: Answer, written: int) -> int:
    """Writes what the answer has grown by since the last call."""
    from millrace_client.cli.render import printable

    new = answer.text[written:]
    sys.stdout.write("\n".join(printable(line) for line in new.split("\n")))
    sys.stdout.flush()
    return len(answer.text)


def _server_sent(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a stream of server-sent events, up to `[DONE]`."""
    import json

    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise errors.ServerFault(f"the router sent no JSON: {data[:ERROR_CHARACTERS_MAX]}") from error
        if isinstance(chunk, dict):
            yield chunk
    raise errors.Unavailable("the answer broke off before its end")


def _take(answer: Answer, chunk: dict[str, Any]) -> bool:
    """Adds a chunk to the answer; tells whether there is new text."""
    if "error" in chunk:
        raise errors.ServerFault(_error_text(chunk))
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        answer.usage = usage
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return False
    answer.finish_reason = choices[0].get("finish_reason") or answer.finish_reason
    content = (choices[0].get("delta") or {}).get("content")
    if not isinstance(content, str) or not content:
        return False
    answer.text += content
    return True


def _error_text(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or body)[:ERROR_CHARACTERS_MAX]


def _refusal(response: "httpx.Response", model: str) -> errors.MillraceError:
    """Converts an OpenAI-shaped refusal; the status decides the kind."""
    try:
        text = _error_text(response.json())
    except ValueError:
        text = response.text[:ERROR_CHARACTERS_MAX] or response.reason_phrase
    status = response.status_code
    retry_after = response.headers.get("retry-after", "")
    if retry_after:
        text += f" (try again in {retry_after} s)"
    if status == 401:
        return errors.Unauthenticated(
            f"the router refuses the API key: {text} (give another with --api-key-file FILE)"
        )
    if status == 404:
        return errors.NotFound(
            f"the API key opens no deployment `{model}`: a key is good for its own namespace "
            f"(`millrace get -A` lists what there is; give another key with --api-key-file FILE)"
        )
    kinds: dict[int, type[errors.MillraceError]] = {
        403: errors.PermissionDenied,
        429: errors.ResourceExhausted,
        503: errors.FailedPrecondition,
    }
    if status in kinds:
        return kinds[status](text)
    if status < 500:
        return errors.InvalidArgument(text)
    return errors.ServerFault(f"the router answers {status}: {text} (its log has the details)")
