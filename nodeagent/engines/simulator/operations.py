"""The routes that operate an engine instead of asking it: sleep, cache, adapters, event sources.

In: requests of the development mode and of runtime adapter updates. Out: vLLM's answers. A route
exists only where the flag that opens it was given, as with vLLM's environment variables.
Must not: touch inference.
"""

from collections.abc import Callable, Mapping
from urllib.parse import parse_qs

from nodeagent.engines.simulator import openai_requests
from nodeagent.engines.simulator.engine import SimulatedEngine
from nodeagent.engines.simulator.errors import RequestError, validation_error
from nodeagent.engines.simulator.http_server import HttpRequest, HttpResponse, json_response
from nodeagent.engines.simulator.settings import SimulatorSettings

Route = Callable[[HttpRequest], HttpResponse]


def _user_error(message: str, status: int = 400, kind: str = "InvalidUserInput") -> RequestError:
    return RequestError(status, message, kind=kind)


def _text(content: str) -> HttpResponse:
    return HttpResponse(200, content.encode(), "text/plain; charset=utf-8")


class Operations:
    """Operating routes of one engine."""

    def __init__(self, settings: SimulatorSettings, engine: SimulatedEngine) -> None:
        self._settings = settings
        self._engine = engine

    def routes(self) -> Mapping[tuple[str, str], Route]:
        """Method and path to route, of those that the settings open."""
        routes: dict[tuple[str, str], Route] = {
            ("GET", "/kv_event_sources"): lambda _: json_response(200, self._engine.kv_event_sources())
        }
        if self._settings.development_mode:
            routes |= {
                ("POST", "/sleep"): self._sleep,
                ("POST", "/wake_up"): self._wake_up,
                ("GET", "/is_sleeping"): self._is_sleeping,
                ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            }
        if self._settings.runtime_lora_updating:
            routes |= {
                ("POST", "/v1/load_lora_adapter"): self._load_adapter,
                ("POST", "/v1/unload_lora_adapter"): self._unload_adapter,
            }
        return routes

    def _sleep(self, request: HttpRequest) -> HttpResponse:
        query = parse_qs(request.query)
        level, mode = query.get("level", ["1"])[-1], query.get("mode", ["abort"])[-1]
        if level not in {"0", "1", "2"}:
            raise validation_error("level must be 0, 1 or 2", "level")
        if mode not in {"abort", "keep"}:
            raise validation_error("the simulator knows the modes abort and keep", "mode")
        self._engine.sleep(int(level), mode)
        return json_response(200, {"status": "sleeping", "level": int(level)})

    def _wake_up(self, request: HttpRequest) -> HttpResponse:
        self._engine.wake_up()
        return json_response(200, {"status": "awake", "tags": parse_qs(request.query).get("tags")})

    def _is_sleeping(self, request: HttpRequest) -> HttpResponse:  # noqa: ARG002 - a route's signature
        return json_response(200, {"is_sleeping": self._engine.sleep_level is not None})

    def _reset_prefix_cache(self, request: HttpRequest) -> HttpResponse:  # noqa: ARG002 - a route's signature
        return json_response(200, {"success": self._engine.reset_prefix_cache()})

    def _load_adapter(self, request: HttpRequest) -> HttpResponse:
        body = openai_requests.parse_body(request.headers, request.body)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
            raise _user_error("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self._settings.served_model_names:
            raise _user_error(f"The lora adapter '{name}' conflicts with a served base model.")
        if not self._settings.enable_lora:
            raise _user_error("LoRA is not enabled. Use --enable-lora.", 500, "InternalServerError")
        if name in self._engine.adapters and body.get("load_inplace") is not True:
            raise _user_error(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
                "in place, set 'load_inplace' to True."
            )
        self._engine.load_adapter(name, path)
        return _text(f"Success: LoRA adapter '{name}' added successfully.")

    def _unload_adapter(self, request: HttpRequest) -> HttpResponse:
        name = openai_requests.parse_body(request.headers, request.body).get("lora_name")
        if not isinstance(name, str) or not name:
            raise _user_error("'lora_name' needs to be provided to unload a LoRA adapter.")
        if self._engine.adapters.pop(name, None) is None:
            raise _user_error(f"The lora adapter '{name}' cannot be found.", 404, "NotFoundError")
        return _text(f"Success: LoRA adapter '{name}' removed successfully.")
