"""The routes: what each path answers, and how a request lives between HTTP and the engine.

In: `HttpRequest`s. Out: answers and streams in vLLM's shapes.
Every inference request is submitted once and, whatever happens to its client, left once: the
`finally` of its coroutine aborts what has not ended, which frees its KV blocks.
Must not: know sockets or compute steps.
"""

import array
import asyncio
import base64
import hashlib
import math
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

from nodeagent.engines.simulator import openai_requests, openai_responses, other_surfaces, tokenizer
from nodeagent.engines.simulator.engine import QueueFullError, SimulatedEngine
from nodeagent.engines.simulator.engine_driver import EngineDeadError
from nodeagent.engines.simulator.errors import (
    RequestError,
    bad_request,
    engine_dead,
    queue_full,
    shutting_down,
    validation_error,
)
from nodeagent.engines.simulator.faults import Fate, Faults
from nodeagent.engines.simulator.http_server import (
    HttpRequest,
    HttpResponse,
    StreamResponse,
    json_response,
)
from nodeagent.engines.simulator.openai_requests import Generation
from nodeagent.engines.simulator.openai_responses import ResponseShape
from nodeagent.engines.simulator.operations import Operations
from nodeagent.engines.simulator.settings import SimulatorSettings

# The engine that is imitated, with a local version that says who answers.
VERSION: Final = "0.32.0+simulator"
EMBEDDING_DIMENSIONS: Final = 32
_METRICS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Answer = HttpResponse | StreamResponse


class SimulatorApi:
    """All routes of one simulator.

    `draining` is set once the process has been told to stop: new inference requests on open
    connections are then refused as vLLM refuses them.
    """

    def __init__(
        self,
        settings: SimulatorSettings,
        engine: SimulatedEngine,
        faults: Faults,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._faults = faults
        self._created = int(time.time())
        self.draining = False
        self._inference: dict[str, Callable[[HttpRequest, bool], Awaitable[Answer]]] = {
            "/v1/chat/completions": self._chat_completions,
            "/v1/completions": self._completions,
            "/v1/embeddings": self._embeddings,
            "/v1/responses": self._response,
            "/v1/messages": self._message,
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), self._rank),
            **dict.fromkeys(("/score", "/v1/score"), self._score),
        }
        self._responses = other_surfaces.Responses()
        self._other: dict[tuple[str, str], Callable[[HttpRequest], HttpResponse]] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/version"): lambda _: json_response(200, {"version": VERSION}),
            ("GET", "/load"): lambda _: json_response(200, {"server_load": 0}),
            ("GET", "/v1/models"): self._models,
            ("GET", "/metrics"): self._metrics_text,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/v1/messages/count_tokens"): self._count_tokens,
            **Operations(settings, engine).routes(),
        }
        self._paths = {path for _, path in self._other} | set(self._inference)

    async def handle(self, request: HttpRequest) -> Answer:
        """Answers one request; refusals come as answers, not as exceptions."""
        try:
            return await self._route(request)
        except RequestError as error:
            return json_response(error.status, error.body())
        except EngineDeadError as error:
            return json_response(500, engine_dead(str(error)).body())
        except QueueFullError as full:
            return json_response(503, queue_full(full.reason).body())

    async def _route(self, request: HttpRequest) -> Answer:
        if request.method == "POST" and request.path in self._inference:
            crash = await self._admit()
            return await self._inference[request.path](request, crash)
        route = self._other.get((request.method, request.path))
        if route is not None:
            return route(request)
        if request.path.startswith("/v1/responses/"):
            return self._look_up(request)
        if request.path in self._paths:
            return json_response(405, {"detail": "Method Not Allowed"})
        return json_response(404, {"detail": "Not Found"})

    async def _admit(self) -> bool:
        """Lets an inference request in, stalls or refuses it; True if it is to crash later."""
        if self._faults.settings.never_ready:
            raise RequestError(503, "The engine is not ready.", kind="Service Unavailable")
        if self.draining:
            raise shutting_down()
        if self._engine.dead:
            raise EngineDeadError
        fate = self._faults.next_fate()
        if fate is Fate.STALL:
            # The wait ends with the connection: its loss cancels this coroutine.
            await asyncio.Event().wait()
        return fate is Fate.CRASH

    def _health(self, request: HttpRequest) -> HttpResponse:  # noqa: ARG002 - a route's signature
        ready = not self._faults.settings.never_ready and not self._engine.dead
        return HttpResponse(200 if ready else 503)

    def _models(self, request: HttpRequest) -> HttpResponse:  # noqa: ARG002 - a route's signature
        models: list[dict[str, Any]] = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "vllm",
                "root": self._settings.model,
                "parent": None,
                "max_model_len": self._settings.limits.max_model_length_tokens,
                "permission": [],
            }
            for name in self._settings.served_model_names
        ]
        models += [
            {
                "id": adapter.name,
                "object": "model",
                "created": self._created,
                "owned_by": "vllm",
                "root": adapter.path,
                "parent": self._settings.metric_model_name,
                "max_model_len": None,
                "permission": [],
            }
            for adapter in self._engine.adapters.values()
        ]
        return json_response(200, {"object": "list", "data": models})

    def _metrics_text(self, request: HttpRequest) -> HttpResponse:  # noqa: ARG002 - a route's signature
        return HttpResponse(200, self._engine.metrics_text(), _METRICS_CONTENT_TYPE)

    def _tokenize(self, request: HttpRequest) -> HttpResponse:
        body = openai_requests.parse_body(request.headers, request.body)
        openai_requests.check_model(body, self._settings, self._engine.adapters)
        if "messages" in body:
            token_ids, _ = openai_requests.chat_prompt(body, self._settings)
        else:
            prompt = body.get("prompt")
            if not isinstance(prompt, str):
                raise validation_error("prompt must be a string", "prompt")
            token_ids, _ = openai_requests.text_prompt(prompt, "prompt", self._settings)
        strings = None
        if body.get("return_token_strs") is True:
            strings = [tokenizer.piece(token_id) for token_id in token_ids]
        content = {
            "count": len(token_ids),
            "max_model_len": self._settings.limits.max_model_length_tokens,
            "tokens": token_ids,
            "token_strs": strings,
        }
        return json_response(200, content)

    def _detokenize(self, request: HttpRequest) -> HttpResponse:
        body = openai_requests.parse_body(request.headers, request.body)
        openai_requests.check_model(body, self._settings, self._engine.adapters)
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise validation_error("tokens must be a list of token ids", "tokens")
        token_ids, _ = openai_requests.text_prompt(tokens, "tokens", self._settings)
        return json_response(200, {"prompt": tokenizer.decode(token_ids)})

    async def _chat_completions(self, request: HttpRequest, crash: bool) -> Answer:
        return await self._generate(request, chat=True, crash=crash)

    async def _completions(self, request: HttpRequest, crash: bool) -> Answer:
        return await self._generate(request, chat=False, crash=crash)

    async def _generate(self, request: HttpRequest, *, chat: bool, crash: bool) -> Answer:
        body = openai_requests.parse_body(request.headers, request.body)
        generation = openai_requests.parse_generation(body, self._settings, self._engine.adapters, chat=chat)
        request_id = request.headers.get("x-request-id") or generation.request_id
        rank = openai_requests.data_parallel_rank(request.headers, self._settings)
        self._engine.check_admission()
        prefix = "chatcmpl-" if chat else "cmpl-"
        lora = generation.request.lora
        shape = ResponseShape(
            chat=chat,
            response_id=prefix + (request_id or os.urandom(16).hex()),
            created=int(time.time()),
            model=lora.name if lora is not None else self._settings.metric_model_name,
            prompt_tokens=len(generation.request.prompt_token_ids),
            prompt_tokens_details=self._settings.prompt_tokens_details,
        )
        if generation.stream:
            return StreamResponse(self._stream(generation, shape, rank, crash=crash))
        return await self._answer_whole(generation, shape, rank, crash=crash)

    async def _answer_whole(
        self, generation: Generation, shape: ResponseShape, rank: int | None, *, crash: bool
    ) -> HttpResponse:
        stream = self._engine.submit(generation.request, rank)
        try:
            count = 0
            while new := await stream.receive():
                if crash:
                    self._faults.crash()
                count += new
        finally:
            self._engine.abort(stream)
        content = shape.whole(
            generation.text(0, count),
            stream.finish_reason,
            count,
            stream.sequence.cached_tokens,
        )
        return json_response(200, content)

    async def _stream(
        self, generation: Generation, shape: ResponseShape, rank: int | None, *, crash: bool
    ) -> AsyncGenerator[bytes, None]:
        stream = self._engine.submit(generation.request, rank)

        def running_usage(count: int) -> dict[str, Any] | None:
            return shape.usage(count, None) if generation.continuous_usage else None

        try:
            count = 0
            while new := await stream.receive():
                events = []
                if count == 0 and shape.chat:
                    events.append(shape.role_chunk(running_usage(0)))
                for _ in range(new):
                    text = generation.text(count, count + 1)
                    count += 1
                    events.append(shape.text_chunk(text, running_usage(count)))
                    if self._faults.dies_after(count):
                        self._engine.kill()
                        break
                yield b"".join(events)
                if crash:
                    self._faults.crash()
                if self._engine.dead:
                    raise EngineDeadError
            events = [shape.finish_chunk(stream.finish_reason, running_usage(count))]
            if generation.include_usage:
                usage = shape.usage(count, stream.sequence.cached_tokens)
                events.append(shape.usage_chunk(usage))
            yield b"".join([*events, openai_responses.DONE])
        except EngineDeadError as error:
            yield openai_responses.event(engine_dead(str(error)).body()) + openai_responses.DONE
        finally:
            self._engine.abort(stream)

    async def _response(self, request: HttpRequest, crash: bool) -> Answer:
        body = openai_requests.parse_body(request.headers, request.body)
        chat = other_surfaces.response_chat(body, self._responses)
        generation, rank = self._other_generation(request, chat)
        response_id = body.get("request_id") or f"resp_{os.urandom(8).hex()}"
        document = other_surfaces.new_response(response_id, self._settings.metric_model_name, body)
        told = other_surfaces.Told(prompt_tokens=len(generation.request.prompt_token_ids))
        pieces = self._pieces(generation, rank, told, crash=crash)
        if generation.stream:
            events = other_surfaces.response_events(document, chat, pieces, told, self._responses)
            return StreamResponse(self._named_events(events))
        text = "".join([text async for text in pieces])
        return json_response(200, self._responses.finished(document, chat, text, told))

    async def _message(self, request: HttpRequest, crash: bool) -> Answer:
        body = openai_requests.parse_body(request.headers, request.body)
        generation, rank = self._other_generation(request, other_surfaces.message_chat(body))
        message_id = "chatcmpl-" + (request.headers.get("x-request-id") or os.urandom(8).hex())
        model = self._settings.metric_model_name
        told = other_surfaces.Told(prompt_tokens=len(generation.request.prompt_token_ids))
        pieces = self._pieces(generation, rank, told, crash=crash)
        if generation.stream:
            return StreamResponse(
                self._named_events(other_surfaces.message_events(message_id, model, pieces, told))
            )
        text = "".join([text async for text in pieces])
        return json_response(200, other_surfaces.whole_message(message_id, model, text, told))

    def _other_generation(
        self, request: HttpRequest, chat: openai_requests.Body
    ) -> tuple[Generation, int | None]:
        generation = openai_requests.parse_generation(chat, self._settings, self._engine.adapters, chat=True)
        rank = openai_requests.data_parallel_rank(request.headers, self._settings)
        self._engine.check_admission()
        return generation, rank

    async def _pieces(
        self, generation: Generation, rank: int | None, told: other_surfaces.Told, *, crash: bool
    ) -> AsyncGenerator[str, None]:
        """The text of an answer, token by token; what there is to tell of it is in `told` at the end."""
        stream = self._engine.submit(generation.request, rank)
        try:
            while new := await stream.receive():
                for _ in range(new):
                    told.completion_tokens += 1
                    yield generation.text(told.completion_tokens - 1, told.completion_tokens)
                    if generation.stream and self._faults.dies_after(told.completion_tokens):
                        self._engine.kill()
                if crash:
                    self._faults.crash()
                if self._engine.dead:
                    raise EngineDeadError
            told.finish_reason = stream.finish_reason
            told.cached_tokens = stream.sequence.cached_tokens
        finally:
            self._engine.abort(stream)

    async def _named_events(
        self, events: AsyncGenerator[dict[str, Any], None]
    ) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(events):
                async for each in events:
                    yield other_surfaces.named_event(each, openai_responses.event)
        except EngineDeadError as error:
            yield b"event: error\n" + openai_responses.event(
                {"type": "error", "error": {"type": "internal_error", "message": str(error)}}
            )

    def _look_up(self, request: HttpRequest) -> HttpResponse:
        response_id, _, action = request.path.removeprefix("/v1/responses/").partition("/")
        if request.method == "GET" and not action:
            return json_response(200, self._responses.look_up(response_id))
        if request.method == "POST" and action == "cancel":
            return json_response(200, self._responses.cancel(response_id))
        return json_response(404, {"detail": "Not Found"})

    def _count_tokens(self, request: HttpRequest) -> HttpResponse:
        body = openai_requests.parse_body(request.headers, request.body)
        openai_requests.check_model(body, self._settings, self._engine.adapters)
        token_ids, _ = openai_requests.chat_prompt(other_surfaces.message_chat(body), self._settings)
        return json_response(200, {"input_tokens": len(token_ids)})

    async def _rank(self, request: HttpRequest, crash: bool) -> Answer:
        return await self._compare(request, other_surfaces.ranking, crash=crash)

    async def _score(self, request: HttpRequest, crash: bool) -> Answer:
        return await self._compare(request, other_surfaces.scoring, crash=crash)

    async def _compare(
        self,
        request: HttpRequest,
        answer: Callable[[openai_requests.Body, str, str], dict[str, Any]],
        *,
        crash: bool,
    ) -> Answer:
        body = openai_requests.parse_body(request.headers, request.body)
        openai_requests.check_model(body, self._settings, self._engine.adapters)
        request_id = request.headers.get("x-request-id") or os.urandom(16).hex()
        content = answer(body, request_id, self._settings.metric_model_name)
        await asyncio.sleep(self._settings.timing.step_seconds(content["usage"]["prompt_tokens"], 0))
        if crash:
            self._faults.crash()
        return json_response(200, content)

    async def _embeddings(self, request: HttpRequest, crash: bool) -> Answer:
        body = openai_requests.parse_body(request.headers, request.body)
        token_lists = openai_requests.parse_embedding_inputs(body, self._settings, self._engine.adapters)
        encoding = body.get("encoding_format") or "float"
        if encoding not in {"float", "base64"}:
            raise validation_error("encoding_format must be float or base64", "encoding_format")
        if body.get("dimensions") not in {None, EMBEDDING_DIMENSIONS}:
            raise bad_request(f"The model gives {EMBEDDING_DIMENSIONS} dimensions only.", "dimensions")
        prompt_tokens = sum(len(token_ids) for token_ids in token_lists)
        await asyncio.sleep(self._settings.timing.step_seconds(prompt_tokens, 0))
        if crash:
            self._faults.crash()
        data = [
            {"index": index, "object": "embedding", "embedding": _embedding(token_ids, encoding)}
            for index, token_ids in enumerate(token_lists)
        ]
        request_id = request.headers.get("x-request-id") or os.urandom(16).hex()
        content = {
            "id": f"embd-{request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": self._settings.metric_model_name,
            "data": data,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "total_tokens": prompt_tokens,
                "completion_tokens": 0,
                "prompt_tokens_details": None,
            },
        }
        return json_response(200, content)


def _embedding(token_ids: list[int], encoding: str) -> list[float] | str:
    """A unit vector that depends on the tokens alone."""
    seed = ",".join(map(str, token_ids)).encode()
    raw = hashlib.shake_256(seed).digest(EMBEDDING_DIMENSIONS * 4)
    values = [int.from_bytes(raw[start : start + 4], "big") / 2**31 - 1.0 for start in range(0, len(raw), 4)]
    norm = math.sqrt(sum(value * value for value in values))
    unit = [value / norm for value in values]
    if encoding == "base64":
        return base64.b64encode(array.array("f", unit).tobytes()).decode("ascii")
    return unit
