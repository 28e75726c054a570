"""What callers send and get, as pydantic models: the source of checks and of the OpenAPI document.

Resources are snake_case, as the request format's fields are; what surrounds them is camelCase, as the
answer's `apiKey` is. Bodies are strict: unknown fields and wrong types are refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from controlplane.api import limits
from controlplane.gateway.policies import Autoscale, Rollout, Routing

EngineName = Literal[
    "vllm", "tgi", "sglang", "ollama", "llamacpp", "xllm", "vllm-ascend", "external", "simulator"
]
QuantizationName = Literal["awq", "gptq", "fp8", "none"]
PhaseName = Literal[
    "unspecified", "pending", "unschedulable", "starting", "ready", "degraded", "failed", "stopped"
]

MaxModelLen = Annotated[int, Field(ge=1, le=limits.MAX_MODEL_LEN_MAX)]
Replicas = Annotated[int, Field(ge=0, le=limits.REPLICAS_MAX)]
Priority = Annotated[int, Field(ge=limits.PRIORITY_MIN, le=limits.PRIORITY_MAX)]


class _Body(BaseModel):
    """What callers send."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Resource(BaseModel):
    """Part of a resource: snake_case throughout, as what was declared."""


class _Answer(BaseModel):
    """What surrounds resources: camelCase, as `apiKey` and `pageToken`."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class Toleration(_Body):
    """A taint that does not keep replicas away."""

    key: str = Field(description="Key of the taint.")
    value: str = Field(default="", description="Its value; empty tolerates every value.")


class DevicePin(_Body):
    """Devices of one replica, chosen by hand."""

    node: str = Field(description="Node.")
    device_ids: list[str] = Field(min_length=1, description="Devices of that node.")


class Placement(_Body):
    """Where replicas may run."""

    node_selector: dict[str, str] = Field(
        default_factory=dict, description="Labels that a node must carry, all of them."
    )
    tolerations: list[Toleration] = Field(
        default_factory=list,
        max_length=limits.PLACEMENT_ENTRIES_MAX,
        description="Taints that do not keep replicas away.",
    )
    device_pins: list[DevicePin] = Field(
        default_factory=list,
        max_length=limits.REPLICAS_MAX,
        description="Devices chosen by hand, one entry a replica; replicas beyond them are placed freely.",
    )


class DeclaredModel(_Body):
    """One entry of a declaration."""

    name: str = Field(
        description="Unique within the namespace; lower-case letters, digits, `-`, `.`; at most 63.",
        examples=["qwen-72b"],
    )
    model: str = Field(
        description="Hugging Face id, or absolute path of a model directory.",
        examples=["Qwen/Qwen2.5-72B-Instruct"],
    )
    engine: EngineName = Field(default="vllm", description="Program that serves it.")
    quantization: QuantizationName = Field(default="none", description="Quantization of the weights.")
    max_model_len: MaxModelLen | None = Field(
        default=None, description="Context length in tokens; by default worked out from the model."
    )
    replicas: Replicas | None = Field(
        default=None, description="Replicas; by default 1, or one a URL for external engines."
    )
    extra_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Engine arguments by name; they override anything that was worked out.",
    )
    rollout: Rollout | None = Field(default=None, description="How running replicas are replaced.")
    autoscale: Autoscale | None = Field(
        default=None, description="Lets the number of replicas follow the load."
    )
    priority: Priority | None = Field(
        default=None,
        description="1 (least) to 10; by default 5. A higher one may pre-empt replicas of a lower one.",
    )
    placement: Placement | None = Field(default=None, description="Where replicas may run.")
    routing: Routing | None = Field(default=None, description="How routers treat requests for it.")


class Declaration(_Body):
    """Names models, never hardware. All of them are declared, or none."""

    models: list[DeclaredModel] = Field(
        min_length=1, max_length=limits.MODELS_PER_DECLARATION_MAX, description="One entry a model."
    )
    namespace: str | None = Field(default=None, description="Tenant; generated where absent.")
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="The caller's own labels; stored and returned."
    )


class DeploymentChange(_Body):
    """Fields to change; `null` takes a field back to its default."""

    model: str | None = Field(default=None, description="Hugging Face id, or absolute path.")
    engine: EngineName | None = Field(default=None, description="Program that serves it.")
    quantization: QuantizationName | None = Field(default=None, description="Quantization of the weights.")
    max_model_len: MaxModelLen | None = Field(default=None, description="Context length in tokens.")
    replicas: Replicas | None = Field(default=None, description="Replicas; 0 stops the deployment.")
    extra_args: dict[str, Any] | None = Field(default=None, description="Engine arguments by name.")
    rollout: Rollout | None = Field(default=None, description="How running replicas are replaced.")
    autoscale: Autoscale | None = Field(
        default=None, description="Lets the number of replicas follow the load; null fixes it."
    )
    priority: Priority | None = Field(default=None, description="1 to 10; restarts no engine.")
    placement: Placement | None = Field(default=None, description="Where replicas may run.")
    routing: Routing | None = Field(default=None, description="How routers treat requests for it.")


class SizingTerm(_Resource):
    """One addend of a sizing."""

    name: str
    bytes: int
    explanation: str


class Sizing(_Resource):
    """What one replica needs."""

    parameters: int
    weights_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    overhead_bytes: int
    total_bytes: int
    device_count: int
    tensor_parallel: int
    max_model_len: int
    device_kinds: list[str]
    terms: list[SizingTerm]
    summary: str
    launch_model: str | None


class DeclaredDeployment(_Answer):
    """The answer for one entry of a declaration."""

    name: str
    model: str
    endpoint: str = Field(description="OpenAI-compatible base URL, ends in `/v1`.")
    api_key: str = Field(description="Key for that endpoint. Shown once.")
    status: PhaseName
    watch: str = Field(description="WebSocket URL with events and logs.")
    sizing: Sizing


class DeclarationAnswer(_Answer):
    """The answer to a declaration, in the order of the request."""

    namespace: str
    deployments: list[DeclaredDeployment]


class Condition(_Resource):
    """One fact about a deployment."""

    type: str
    status: Literal["unspecified", "true", "false", "unknown"]
    reason: str
    message: str
    transition_time: str | None


class EngineFacts(_Resource):
    """What an engine reported of itself; null is not told."""

    max_model_len: int | None
    kv_cache_tokens: int | None
    kv_block_tokens: int | None
    weights_bytes: int | None
    kv_cache_bytes: int | None
    graph_bytes: int | None
    resident_bytes: int | None


class Replica(_Resource):
    """One replica."""

    replica: str
    node: str
    state: str
    message: str
    url: str
    generation: int
    assign_time: str | None
    ready_time: str | None
    engine_start_ms: int | None
    pid: int | None
    device_ids: list[str]
    healthy: bool
    facts: EngineFacts | None = Field(description="What the engine reported of itself after its start.")


class Failure(_Resource):
    """How a replica last ended by itself."""

    replica: str
    node: str
    message: str
    log_tail: list[str]
    time: str | None
    consecutive_failures: int
    next_attempt_time: str | None


class RolloutStatus(_Resource):
    """How far the present launch generation has come."""

    launch_generation: int
    serving_generation: int
    updated_replicas: int
    outdated_replicas: int
    progress_time: str | None
    rolled_back_reason: str


class AutoscaleStatus(_Resource):
    """What the autoscaler decided, and why."""

    desired_replicas: int
    floor_replicas: int
    reason: str
    message: str
    out_time: str | None
    step_time: str | None


class Deployment(_Resource):
    """A deployment: what was declared, and what became of it."""

    namespace: str
    name: str
    uid: str
    generation: int
    etag: str
    create_time: str | None
    update_time: str | None
    metadata: dict[str, Any]
    model: str
    engine: EngineName
    quantization: QuantizationName
    max_model_len: int | None
    replicas: int
    extra_args: dict[str, Any]
    rollout: Rollout | None
    autoscale: Autoscale | None
    priority: int
    placement: Placement | None
    routing: Routing | None
    status: PhaseName
    reconciling: bool
    observed_generation: int
    ready_replicas: int
    desired_replicas: int
    conditions: list[Condition]
    replica_states: list[Replica]
    last_failure: Failure | None
    rollout_status: RolloutStatus | None
    autoscale_status: AutoscaleStatus | None
    sizing: Sizing | None


class PlanBody(_Body):
    """A declaration that is only thought through."""

    models: list[DeclaredModel] = Field(
        min_length=1, max_length=limits.MODELS_PER_DECLARATION_MAX, description="One entry a model."
    )
    namespace: str | None = Field(
        default=None, description="Tenant; one without deployments or quota where absent."
    )


class ClaimedDevice(_Resource):
    """A part of a device."""

    device_id: str
    memory_bytes: int


class PlannedReplica(_Resource):
    """A replica that would be started."""

    node: str
    devices: list[ClaimedDevice]
    message: str
    preempts: list[str]


class PlannedDeployment(_Resource):
    """What one entry would take."""

    name: str
    exists: bool
    sizing: Sizing
    replicas: list[PlannedReplica]
    pending_replicas: int
    message: str


class PlanAnswer(_Answer):
    """What a declaration would take, in the order of the request; nothing was changed."""

    deployments: list[PlannedDeployment]


class DeploymentPage(_Answer):
    """One page of deployments."""

    deployments: list[Deployment]
    next_page_token: str
    resource_version: str


class NodeVerdict(_Resource):
    """What one node means for a deployment."""

    node: str
    fits: bool
    failed_rule: str
    message: str
    score: float


class Explanation(_Resource):
    """Why replicas are where they are, or nowhere."""

    summary: str
    suggestion: str
    nodes: list[NodeVerdict]
    sizing: Sizing | None


class Device(_Resource):
    """An accelerator, or a CPU share."""

    id: str
    kind: str
    product: str
    memory_bytes: int
    index: int


class EngineEnvironment(_Resource):
    """An engine that a node can start, or why it cannot."""

    engine: str
    version: str
    device_kinds: list[str]
    unavailable_reason: str


class Taint(_Body):
    """Keeps replicas that do not tolerate it off a node."""

    key: str = Field(description="Key, as a label's.")
    value: str = Field(default="", description="Value; may be empty.")
    effect: Literal["no_schedule", "no_execute"] = Field(
        default="no_schedule", description="Nothing new is placed; `no_execute` also moves what runs away."
    )


class NodeChange(_Body):
    """What operators change of a node; what is named is replaced whole."""

    labels: dict[str, str] | None = Field(default=None, description="Operator's labels.")
    taints: list[Taint] | None = Field(
        default=None, max_length=limits.PLACEMENT_ENTRIES_MAX, description="Taints."
    )


class Node(_Resource):
    """A machine."""

    name: str
    etag: str
    cordoned: bool
    draining: bool
    labels: dict[str, str]
    taints: list[Taint]
    state: str
    transition_time: str | None
    heartbeat_time: str | None
    version: str
    agent_target: str
    memory_bytes: int
    processors: int
    devices: list[Device]
    engines: list[EngineEnvironment]
    replicas: list[str]


class NodePage(_Answer):
    """One page of nodes."""

    nodes: list[Node]
    next_page_token: str
    resource_version: str


class DrainAnswer(_Answer):
    """A node that is being drained."""

    node: Node
    moving: list[str] = Field(description="Deployments whose replicas move, as `namespace/name`.")


class FieldError(_Answer):
    """One wrong field."""

    field: str
    description: str


class ErrorBody(_Answer):
    """What went wrong."""

    code: str
    reason: str
    message: str
    fields: list[FieldError]
    request_id: str


class ErrorAnswer(_Answer):
    """Every answer with a status of 400 or more."""

    error: ErrorBody
