"""What a user wrote, checked: all mistakes at once, each with its path and the remedy.

In come requests and specs, out come violations and, where there are none, the spec with its defaults
filled in. Nothing here does I/O: whether a model exists and fits is asked elsewhere.
"""

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlsplit

from google.protobuf.struct_pb2 import Struct
from millrace.core.v1 import deployment_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2

from controlplane.api import limits
from controlplane.api.lifecycle import check_lifecycle
from controlplane.api.placement import check_placement, check_priority
from controlplane.api.routing import check_routing
from controlplane.api.violations import Violations as Violations  # noqa: PLC0414 - callers check with what this module offers
from controlplane.convert import (
    EXTERNAL_URLS_ARGUMENT,
    SERVED_MODEL_NAME_ARGUMENT,
    external_urls,
    struct_to_dict,
)
from core.errors import InvalidArgument

ENGINE_NAMES: Mapping[types_pb2.Engine.ValueType, str] = {
    types_pb2.ENGINE_VLLM: "vllm",
    types_pb2.ENGINE_TGI: "tgi",
    types_pb2.ENGINE_SGLANG: "sglang",
    types_pb2.ENGINE_OLLAMA: "ollama",
    types_pb2.ENGINE_LLAMACPP: "llamacpp",
    types_pb2.ENGINE_XLLM: "xllm",
    types_pb2.ENGINE_VLLM_ASCEND: "vllm-ascend",
    types_pb2.ENGINE_EXTERNAL: "external",
    types_pb2.ENGINE_SIMULATOR: "simulator",
}
"""Engines as users write them."""

QUANTIZATION_NAMES: Mapping[types_pb2.Quantization.ValueType, str] = {
    types_pb2.QUANTIZATION_NONE: "none",
    types_pb2.QUANTIZATION_AWQ: "awq",
    types_pb2.QUANTIZATION_GPTQ: "gptq",
    types_pb2.QUANTIZATION_FP8: "fp8",
}
"""Quantizations as users write them."""

RUNNABLE_ENGINES = frozenset({types_pb2.ENGINE_VLLM, types_pb2.ENGINE_EXTERNAL, types_pb2.ENGINE_SIMULATOR})
"""Engines that this release can start."""

RESERVED_NAMESPACE_PREFIX = "millrace-"

# The platform gives these to the engine itself: a port of the user's would collide, a key would lock the
# router out and stand in the process list.
_PLATFORM_ARGUMENTS = frozenset({"host", "port", "uds", "api_key", "api-key", "model"})
# One replica over several machines needs agents that start one engine together.
_SEVERAL_MACHINES = frozenset(
    {"nnodes", "node_rank", "master_addr", "distributed_executor_backend", "data_parallel_address"}
)
_EXTERNAL_ARGUMENTS = frozenset({EXTERNAL_URLS_ARGUMENT, SERVED_MODEL_NAME_ARGUMENT})
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_ARGUMENT = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def is_hub_id(model: str) -> bool:
    """Tells whether a model is named by a Hugging Face id."""
    return _HUB_ID.fullmatch(model) is not None and ".." not in model


def check_declaration(
    request: scheduler_service_pb2.DeclareDeploymentsRequest,
) -> list[deployment_pb2.DeploymentSpec]:
    """Checks a declaration and fills in defaults.

    Returns:
        The spec of each model, in the order of the request.

    Raises:
        InvalidArgument: With every violation.
    """
    violations = Violations()
    check_request_id(request.request_id, violations)
    if request.namespace:
        check_namespace(request.namespace, violations)
    _check_json_size(request.metadata, "metadata", limits.METADATA_BYTES_MAX, violations)
    if not request.models:
        violations.add("models", "is empty; declare at least one model")
    if len(request.models) > limits.MODELS_PER_DECLARATION_MAX:
        violations.add(
            "models",
            f"has {len(request.models)} entries; at most {limits.MODELS_PER_DECLARATION_MAX} fit into one "
            "request: split it",
        )
    specs: list[deployment_pb2.DeploymentSpec] = []
    first_at: dict[str, int] = {}
    for index, model in enumerate(request.models[: limits.MODELS_PER_DECLARATION_MAX]):
        path = f"models[{index}]"
        check_name(model.name, f"{path}.name", violations)
        if model.name and first_at.setdefault(model.name, index) != index:
            violations.add(
                f"{path}.name",
                f"`{model.name}` is already the name of models[{first_at[model.name]}]; names must differ",
            )
        spec = with_defaults(_spec_of(model))
        check_spec(spec, f"{path}.", violations)
        specs.append(spec)
    violations.raise_if_any()
    return specs


def check_spec(spec: deployment_pb2.DeploymentSpec, prefix: str, violations: Violations) -> None:
    """Checks a spec whose defaults are filled in.

    Args:
        spec: What is wanted.
        prefix: Put before field names, such as `models[0].`.
        violations: Takes what is wrong.
    """
    _check_model(spec.model, spec.engine, f"{prefix}model", violations)
    _check_engine(spec.engine, f"{prefix}engine", violations)
    if spec.quantization not in QUANTIZATION_NAMES:
        violations.add(
            f"{prefix}quantization",
            f"{spec.quantization} is no quantization; use one of {_listed(QUANTIZATION_NAMES.values())}",
        )
    if spec.HasField("max_model_len") and not 1 <= spec.max_model_len <= limits.MAX_MODEL_LEN_MAX:
        violations.add(
            f"{prefix}max_model_len",
            f"{spec.max_model_len} tokens is out of range; give 1 to {limits.MAX_MODEL_LEN_MAX:,}, or leave "
            "it out to take the model's own",
        )
    check_replicas(spec, f"{prefix}replicas", violations)
    check_priority(spec, prefix, violations.add)
    check_placement(spec, prefix, violations.add)
    _check_extra_args(spec, f"{prefix}extra_args", violations)
    check_lifecycle(spec, prefix, violations)
    if spec.HasField("routing"):
        check_routing(spec.routing, f"{prefix}routing", violations)


def check_replicas(spec: deployment_pb2.DeploymentSpec, field: str, violations: Violations) -> None:
    """Checks the number of replicas; that of an external deployment is the number of its URLs."""
    if not spec.HasField("replicas"):
        return
    if not 0 <= spec.replicas <= limits.REPLICAS_MAX:
        violations.add(field, f"{spec.replicas} is out of range; give 0 to {limits.REPLICAS_MAX}")
        return
    urls = len(external_urls(spec))
    if spec.engine == types_pb2.ENGINE_EXTERNAL and urls and spec.replicas not in {0, urls}:
        violations.add(
            field,
            f"{spec.replicas} does not match the {urls} URL(s) of extra_args.urls; an external deployment "
            "has one replica a URL: leave replicas out, or give 0 to stop it",
        )


def with_defaults(spec: deployment_pb2.DeploymentSpec) -> deployment_pb2.DeploymentSpec:
    """Returns the spec with the defaults that the contract names."""
    filled = deployment_pb2.DeploymentSpec()
    filled.CopyFrom(spec)
    if filled.engine == types_pb2.ENGINE_UNSPECIFIED:
        filled.engine = types_pb2.ENGINE_VLLM
    if filled.quantization == types_pb2.QUANTIZATION_UNSPECIFIED:
        filled.quantization = types_pb2.QUANTIZATION_NONE
    if not filled.HasField("replicas"):
        filled.replicas = len(external_urls(filled)) if filled.engine == types_pb2.ENGINE_EXTERNAL else 1
    return filled


def check_name(name: str, field: str, violations: Violations) -> None:
    """Checks the name of a deployment."""
    if not name:
        violations.add(field, "is empty; give the deployment a name")
    elif len(name) > limits.NAME_LENGTH_MAX or not _NAME.fullmatch(name) or ".." in name:
        violations.add(
            field,
            f"`{_shown(name)}` is no valid name; use lower-case letters, digits, `-` and `.`, beginning and "
            f"ending with a letter or digit, at most {limits.NAME_LENGTH_MAX} characters",
        )


def check_namespace_filter(namespace: str) -> None:
    """Checks the namespace of a listing, so that a typing error is not answered with an empty list.

    Raises:
        InvalidArgument: It is given and no namespace can have that name.
    """
    if namespace and not _is_namespace(namespace):
        raise InvalidArgument.of("namespace", _no_namespace(namespace))


def check_namespace(namespace: str, violations: Violations, *, field: str = "namespace") -> None:
    """Checks the name of a namespace that is written to."""
    if not _is_namespace(namespace):
        violations.add(field, _no_namespace(namespace))
    elif namespace.startswith(RESERVED_NAMESPACE_PREFIX):
        violations.add(
            field,
            f"`{namespace}` is reserved: names beginning with `{RESERVED_NAMESPACE_PREFIX}` belong to "
            "Millrace itself",
        )


def _is_namespace(text: str) -> bool:
    return len(text) <= limits.NAME_LENGTH_MAX and _LABEL.fullmatch(text) is not None


def _no_namespace(text: str) -> str:
    return (
        f"`{_shown(text)}` is no valid namespace; use lower-case letters, digits and `-`, beginning "
        f"and ending with a letter or digit, at most {limits.NAME_LENGTH_MAX} characters"
    )


def check_request_id(request_id: str, violations: Violations) -> None:
    """Checks a request id, where one is given."""
    if not request_id:
        return
    try:
        if len(request_id) > limits.REQUEST_ID_LENGTH_MAX:
            raise ValueError
        uuid.UUID(request_id)
    except ValueError:
        violations.add("request_id", f"`{_shown(request_id)}` is no UUID; make a new UUID4 for each request")


def page_size_of(page_size: int) -> int:
    """Returns the size of a page.

    Raises:
        InvalidArgument: It is negative.
    """
    if page_size < 0:
        raise InvalidArgument.of(
            "page_size", f"{page_size} is negative; give 1 to {limits.PAGE_SIZE_MAX}, or 0"
        )
    return min(page_size or limits.PAGE_SIZE_DEFAULT, limits.PAGE_SIZE_MAX)


def _spec_of(model: scheduler_service_pb2.DeclaredModel) -> deployment_pb2.DeploymentSpec:
    spec = deployment_pb2.DeploymentSpec(
        model=model.model, engine=model.engine, quantization=model.quantization
    )
    if model.HasField("max_model_len"):
        spec.max_model_len = model.max_model_len
    if model.HasField("replicas"):
        spec.replicas = model.replicas
    if model.HasField("extra_args"):
        spec.extra_args.CopyFrom(model.extra_args)
    if model.HasField("rollout"):
        spec.rollout.CopyFrom(model.rollout)
    if model.HasField("autoscale"):
        spec.autoscale.CopyFrom(model.autoscale)
    if model.HasField("priority"):
        spec.priority = model.priority
    if model.HasField("placement"):
        spec.placement.CopyFrom(model.placement)
    if model.HasField("routing"):
        spec.routing.CopyFrom(model.routing)
    return spec


def _check_model(model: str, engine: int, field: str, violations: Violations) -> None:
    if not model:
        violations.add(field, "is empty; give a Hugging Face id or the absolute path of a model directory")
        return
    if len(model) > limits.MODEL_LENGTH_MAX or not model.isprintable() or model != model.strip():
        violations.add(
            field,
            f"`{_shown(model)}` is no model; use at most {limits.MODEL_LENGTH_MAX} printable characters "
            "without blanks around them",
        )
        return
    if engine != types_pb2.ENGINE_VLLM or model.startswith("/") or is_hub_id(model):
        # Other engines take the model as a mere name.
        return
    if model.startswith("~"):
        violations.add(
            field,
            f"`{_shown(model)}`: `~` is not expanded, since the nodes' home directories are not yours; give "
            "an absolute path or a Hugging Face id",
        )
    else:
        violations.add(
            field,
            f"`{_shown(model)}` is neither an absolute path nor a Hugging Face id; give an absolute path "
            "(/models/name) or a Hugging Face id (organisation/name)",
        )


def _check_engine(engine: types_pb2.Engine.ValueType, field: str, violations: Violations) -> None:
    runnable = _listed(ENGINE_NAMES[each] for each in sorted(RUNNABLE_ENGINES))
    name = ENGINE_NAMES.get(engine)
    if name is None:
        violations.add(field, f"{engine} is no engine; use one of {runnable}")
    elif engine not in RUNNABLE_ENGINES:
        violations.add(
            field, f"engine `{name}` is known but this release cannot start it; use one of {runnable}"
        )


def _check_extra_args(spec: deployment_pb2.DeploymentSpec, field: str, violations: Violations) -> None:
    arguments = struct_to_dict(spec.extra_args)
    if len(arguments) > limits.EXTRA_ARGUMENTS_MAX:
        violations.add(field, f"has {len(arguments)} entries; at most {limits.EXTRA_ARGUMENTS_MAX} are taken")
        return
    _check_json_size(spec.extra_args, field, limits.EXTRA_ARGUMENTS_BYTES_MAX, violations)
    for name in sorted(arguments):
        if len(name) > limits.EXTRA_ARGUMENT_NAME_LENGTH_MAX or not _ARGUMENT.fullmatch(name):
            violations.add(
                field,
                f"`{_shown(name)}` is no argument's name; use letters, digits, `_`, `-` and `.`, without "
                "leading dashes",
            )
    if spec.engine == types_pb2.ENGINE_EXTERNAL:
        _check_external(arguments, field, violations)
        return
    for name in sorted(_PLATFORM_ARGUMENTS & arguments.keys()):
        violations.add(f"{field}.{name}", "is set by Millrace itself; leave it out")
    for name in sorted(_SEVERAL_MACHINES & arguments.keys()):
        if arguments[name] not in {1, "1", "mp", "uni"}:
            violations.add(
                f"{field}.{name}",
                "spreads one replica over several machines, which node agents cannot start yet: each of them "
                "starts engines on its own machine alone; leave it out, and choose a quantization or model "
                "that fits one machine",
            )


def _check_external(arguments: Mapping[str, object], field: str, violations: Violations) -> None:
    for name in sorted(arguments.keys() - _EXTERNAL_ARGUMENTS):
        violations.add(
            f"{field}.{_shown(name)}",
            f"means nothing for an external engine; it takes {_listed(sorted(_EXTERNAL_ARGUMENTS))}",
        )
    name_given = arguments.get(SERVED_MODEL_NAME_ARGUMENT, "x")
    if not isinstance(name_given, str) or not name_given:
        violations.add(
            f"{field}.{SERVED_MODEL_NAME_ARGUMENT}",
            "must be the model's name at the external engine, as text",
        )
    urls = arguments.get(EXTERNAL_URLS_ARGUMENT)
    urls_field = f"{field}.{EXTERNAL_URLS_ARGUMENT}"
    if not isinstance(urls, list) or not urls:
        violations.add(
            urls_field,
            'an external engine needs the URLs that it is reached at: "urls": ["http://10.0.0.5:8000"]',
        )
        return
    if len(urls) > limits.EXTERNAL_URLS_MAX:
        violations.add(urls_field, f"has {len(urls)} entries; at most {limits.EXTERNAL_URLS_MAX} are taken")
        return
    seen: set[str] = set()
    for index, url in enumerate(urls):
        problem = _url_problem(url)
        if problem:
            violations.add(f"{urls_field}[{index}]", problem)
        elif isinstance(url, str) and url.rstrip("/") in seen:
            violations.add(f"{urls_field}[{index}]", "is there twice; give each URL once")
        elif isinstance(url, str):
            seen.add(url.rstrip("/"))


def _url_problem(url: object) -> str:
    if not isinstance(url, str):
        return "is no text; give a URL such as http://10.0.0.5:8000"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable, parts = False, urlsplit("")
    if not usable or not url.isprintable() or " " in url:
        return f"`{_shown(url)}` is no http(s) URL; give one such as http://10.0.0.5:8000"
    if parts.username is not None or parts.password is not None:
        return "holds a user name or password, which would be readable in the state; leave it out"
    if parts.query or parts.fragment:
        return "has a query or fragment; give the base URL alone"
    if parts.path.rstrip("/").endswith("/v1"):
        return "ends in /v1; give the base URL without it"
    return ""


def _check_json_size(values: Struct, field: str, bytes_max: int, violations: Violations) -> None:
    plain = struct_to_dict(values)
    if _depth(plain) > limits.JSON_DEPTH_MAX:
        violations.add(field, f"nests deeper than {limits.JSON_DEPTH_MAX} levels; flatten it")
        return
    size = len(json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace"))
    if size > bytes_max:
        violations.add(field, f"has {size} bytes as JSON; at most {bytes_max} are taken")


def _depth(value: object) -> int:
    if isinstance(value, Mapping):
        return 1 + max((_depth(each) for each in value.values()), default=0)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return 1 + max((_depth(each) for each in value), default=0)
    return 0


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shown(text: str) -> str:
    """Shortens what a user wrote, so that an error does not carry a book."""
    return text if len(text) <= 80 else text[:77] + "..."
