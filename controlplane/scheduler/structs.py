"""The words of scheduling: an immutable snapshot goes in, a plan in named buckets comes out.

Everything is a frozen value without protobuf, clock or store, so that a plan can be compared, logged and
replayed. Times are aware UTC datetimes; memory is in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum

from core.states import DeviceKind, Engine, NodeState, ReplicaState, TaintEffect

PRIORITY_DEFAULT = 5
"""Of a deployment that does not say; the middle of 1 to 10."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The bounds that decisions keep to, in one place.

    Attributes:
        drain: How long a draining replica may finish its requests.
        unclaimed_grace: After the drain deadline, how long a replica that no agent ever took up is kept.
        stable: A replica that served so long ends a row of failures.
        back_off_max: Longest wait between attempts.
        frozen_share: More than this share of nodes without word is a fault of ours or of the network.
        frozen_nodes_min: A single silent machine beside others that answer is a dead machine, not a fault
            of the network; below this many, only a cluster without any answering node is frozen.
        surge: Replicas above the wanted number while others are replaced.
        progress_deadline: How long a rolling update may come no further.
        rollout_failures_max: Failed starts in a row that end a rolling update.
    """

    drain: timedelta = timedelta(seconds=30)
    unclaimed_grace: timedelta = timedelta(seconds=30)
    stable: timedelta = timedelta(seconds=60)
    back_off_max: timedelta = timedelta(seconds=300)
    frozen_share: float = 0.30
    frozen_nodes_min: int = 2
    surge: int = 1
    progress_deadline: timedelta = timedelta(minutes=10)
    rollout_failures_max: int = 3


@dataclass(frozen=True, slots=True)
class Toleration:
    """A taint that does not keep replicas away; an empty value tolerates every value."""

    key: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Taint:
    """Keeps replicas that do not tolerate it off a node."""

    key: str
    value: str
    effect: TaintEffect

    def tolerated_by(self, tolerations: tuple[Toleration, ...]) -> bool:
        """True when one of them names this taint."""
        return any(each.key == self.key and each.value in {"", self.value} for each in tolerations)


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica takes, and where it may go. Equal needs are placed alike.

    Attributes:
        engine: Program that serves it.
        device_kinds: Kinds of device that can run it, best first; empty for no device.
        device_count: Equal devices of one node: all of them or none.
        memory_bytes: Memory over all devices.
        model: What is loaded, for nodes that hold its weights already; empty where that is not known.
        node_selector: Labels that a node must carry, sorted.
        tolerations: Taints that do not keep it away.
    """

    engine: Engine
    device_kinds: tuple[DeviceKind, ...] = ()
    device_count: int = 0
    memory_bytes: int = 0
    model: str = ""
    node_selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[Toleration, ...] = ()

    @property
    def device_memory_bytes(self) -> int:
        """Memory on each device, rounded up."""
        return -(-self.memory_bytes // self.device_count) if self.device_count else 0


@dataclass(frozen=True, slots=True)
class Failure:
    """How a replica ended by itself.

    Attributes:
        replica: Which.
        node: Where it ran.
        message: What happened.
        time: When.
        consecutive: Failed attempts in a row.
        next_attempt: When the next one is made; None when it is made at once.
        generation: Launch generation of the replica.
    """

    replica: str
    node: str
    message: str
    time: datetime
    consecutive: int
    next_attempt: datetime | None = None
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a user allows a rolling update; None leaves it to the policy.

    Attributes:
        surge: Replicas above the wanted number.
        unavailable: Replicas below the wanted number; None for 0, or 1 where a surge has no room.
        progress_deadline: How long it may come no further.
        drain: How long a draining replica may finish its requests.
    """

    surge: int | None = None
    unavailable: int | None = None
    progress_deadline: timedelta | None = None
    drain: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch generation that has served, and what one of its replicas takes."""

    generation: int
    need: Need


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a launch generation has come.

    Attributes:
        generation: Which.
        progress_time: When it came further than ever before.
        served: Most replicas of it that have served at once.
        furthest: Furthest state of a replica that does not serve yet, since the last one came to serve.
        complete_time: When every replica was of it and served; None before.
        rolled_back_reason: Why it was given up; empty while it was not.
    """

    generation: int
    progress_time: datetime
    served: int = 0
    furthest: ReplicaState = ReplicaState.PENDING
    complete_time: datetime | None = None
    rolled_back_reason: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """Memory taken on a device."""

    device_id: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Pin:
    """Devices of one replica, chosen by hand."""

    node: str
    device_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room that is kept for a replica until those that it pre-empted have ended.

    Attributes:
        node: Where.
        claims: What is kept.
        victims: Replicas that make room, by name.
        deadline: When the last of them is stopped at the latest.
    """

    node: str
    claims: tuple[Claim, ...]
    victims: tuple[str, ...]
    deadline: datetime


@dataclass(frozen=True, slots=True)
class Preemption:
    """How a deployment lost a replica to a more important one; remembered until all are placed again.

    Attributes:
        by: `namespace/name` of the deployment that took the room.
        by_priority: Its priority then.
        replica: Which replica made room.
        node: Where.
        time: When.
    """

    by: str
    by_priority: int
    replica: str
    node: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Quota:
    """What a namespace may hold; None is unbounded."""

    devices: int | None = None
    replicas: int | None = None


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """What a user wants, and what was concluded about it before.

    Attributes:
        key: `namespace/name`.
        uid: Tells a re-created deployment apart.
        generation: Grows with every change of the spec.
        launch_generation: Launch generation that new replicas are started from.
        desired: Replicas wanted.
        need: What one of that launch generation takes.
        external_urls: URLs of an external deployment: one replica each.
        failure: The last failure; None where none is remembered.
        observed_generation: Generation of the previous conclusion; 0 without one.
        spec_launch_generation: Launch generation of the spec, which grows with every change that needs new
            engines; 0 where it is `launch_generation`. They differ after a roll back.
        limits: What a rolling update may do.
        progress: How far the spec's launch generation has come; None before the first look.
        good: The launch that a failed update goes back to; None where none has served.
        priority: 1, least, to 10.
        pins: Devices chosen by hand, one entry a replica.
        reservations: Room that is kept for its replicas.
        preemption: How it last lost a replica to a more important deployment; None where that is over.
    """

    key: str
    uid: str
    generation: int
    launch_generation: int
    desired: int
    need: Need
    external_urls: tuple[str, ...] = ()
    failure: Failure | None = None
    observed_generation: int = 0
    spec_launch_generation: int = 0
    limits: Limits = Limits()
    progress: Progress | None = None
    good: Launch | None = None
    priority: int = PRIORITY_DEFAULT
    pins: tuple[Pin, ...] = ()
    reservations: tuple[Reservation, ...] = ()
    preemption: Preemption | None = None

    @property
    def declared_generation(self) -> int:
        """Launch generation of the spec."""
        return self.spec_launch_generation or self.launch_generation

    @property
    def namespace(self) -> str:
        """Tenant that owns it."""
        return self.key.partition("/")[0]


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device of a node."""

    device_id: str
    kind: DeviceKind
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine that a node can start, or why it cannot."""

    engine: Engine
    device_kinds: frozenset[DeviceKind]
    unavailable_reason: str = ""


@dataclass(frozen=True, slots=True)
class NodeView:
    """A machine, as the control plane believes it to be.

    Attributes:
        name: Which.
        state: Whether it answers.
        cordoned: Takes no new replicas.
        draining: Its replicas are moved away.
        devices: What it has.
        engines: What it can start.
        labels: Those of the agent and of operators.
        taints: What keeps replicas off it.
        cached_models: Models whose weights it holds.
        heat: How busy its devices were when last told, 0 to 1; None where that is not known.
    """

    name: str
    state: NodeState
    cordoned: bool = False
    draining: bool = False
    devices: tuple[DeviceView, ...] = ()
    engines: tuple[EngineView, ...] = ()
    labels: frozenset[tuple[str, str]] = frozenset()
    taints: tuple[Taint, ...] = ()
    cached_models: frozenset[str] = frozenset()
    heat: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica: what was ordered and what was seen of it.

    Attributes:
        replica: Identifier, unique for all time.
        deployment: `namespace/name` of its owner.
        uid: Owner's uid.
        generation: Launch generation that it comes from.
        node: Where it is placed.
        claims: What it takes there.
        draining: True once it was ordered to end.
        state: How far it has come; ASSIGNED until the agent says more.
        created: When it was placed.
        external_url: URL that it stands for; empty for engines of our own.
        healthy: False once a serving engine fails its checks.
        observed: True once an agent has reported it.
        state_time: When it came to its state; None where that is not known.
        ready_time: When it first served; None if never.
        drain_deadline: When it is stopped at the latest; None while it serves.
        message: What the agent says.
        preempted_by: `namespace/name` of the deployment that it makes room for; empty for none.
    """

    replica: str
    deployment: str
    uid: str
    generation: int
    node: str
    claims: tuple[Claim, ...]
    draining: bool
    state: ReplicaState
    created: datetime
    external_url: str = ""
    healthy: bool = True
    observed: bool = False
    state_time: datetime | None = None
    ready_time: datetime | None = None
    drain_deadline: datetime | None = None
    message: str = ""
    preempted_by: str = ""

    @property
    def serves(self) -> bool:
        """True while it takes requests."""
        return not self.draining and self.state is ReplicaState.READY


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole cluster at one moment."""

    deployments: Mapping[str, DeploymentView] = field(default_factory=dict)
    nodes: Mapping[str, NodeView] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaView] = field(default_factory=dict)
    quotas: Mapping[str, Quota] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Start a replica of a launch generation."""

    replica: str
    deployment: str
    node: str
    claims: tuple[Claim, ...]
    why: str
    external_url: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Drain:
    """Let a replica finish and end.

    Attributes:
        replica: Which.
        deployment: Its owner.
        deadline: When it is stopped at the latest.
        why: In words.
        preempted_by: `namespace/name` of the deployment that it makes room for; empty for none.
    """

    replica: str
    deployment: str
    deadline: datetime
    why: str
    preempted_by: str = ""


@dataclass(frozen=True, slots=True)
class Remove:
    """Forget a replica: it has ended, or its node is gone.

    Attributes:
        replica: Which.
        deployment: Its owner.
        why: In words.
        reason: In CamelCase: Stopped, ReplicaFailed, NodeLost.
    """

    replica: str
    deployment: str
    why: str
    reason: str


class Truth(Enum):
    """A three-valued truth."""

    TRUE = 1
    FALSE = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Condition:
    """One fact about a deployment."""

    status: Truth
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What was concluded about a deployment.

    Attributes:
        deployment: Which.
        scheduled: Whether its replicas are placed.
        available: Whether some serve.
        failure: What is remembered of failures.
        pending: Replicas that are wanted and not placed.
        progressing: How its launch generation comes on; None where nobody asked.
        progress: The same, to be kept.
        good_generation: Launch generation that a failed update goes back to.
    """

    deployment: str
    scheduled: Condition
    available: Condition
    failure: Failure | None = None
    pending: int = 0
    progressing: Condition | None = None
    progress: Progress | None = None
    good_generation: int | None = None
    reservations: tuple[Reservation, ...] = ()
    preemption: Preemption | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now.

    Attributes:
        place: Replicas to start.
        drain: Replicas to let finish.
        remove: Replicas to forget.
        conclusions: What to tell users: one for each deployment that was looked at.
        retry_after: When time alone can change the plan; None when only an event can.
        frozen: Why rescheduling off silent nodes is suspended; empty when it is not.
    """

    place: tuple[Place, ...] = ()
    drain: tuple[Drain, ...] = ()
    remove: tuple[Remove, ...] = ()
    conclusions: tuple[Conclusion, ...] = ()
    retry_after: datetime | None = None
    frozen: str = ""

    @property
    def empty(self) -> bool:
        """True when nothing is to be done."""
        return not (self.place or self.drain or self.remove)
