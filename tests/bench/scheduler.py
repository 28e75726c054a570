"""Measures how long the control plane thinks: full plans, and rounds of the loop after one change.

    python -m tests.bench.scheduler [--nodes 1000] [--deployments 500] [--replicas 10] [--profile]

In one process, without a network: the records lie in the in-memory store, and a round is what the
reconciler does between a wake-up and its commit (changes -> books -> plan -> transactions). Prints tables
in Markdown, in processor time, which other work on the machine disturbs least, and the worst in wall time;
the budgets are 1 s for a full plan and 20 ms for a round after one change.
"""

import argparse
import asyncio
import cProfile
import io
import itertools
import pstats
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from millrace.core.v1 import deployment_pb2, node_pb2, replica_pb2, sizing_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.reconciler.loop import new_replica_id
from controlplane.reconciler.snapshot import build_snapshot, follow
from controlplane.reconciler.translate import translate
from controlplane.reconciler.view import ClusterView
from controlplane.scheduler import Plan, Planner, plan
from core.clock import to_timestamp
from core.store import Operation, Put, keys
from core.store.memory import MemoryStore
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock

GIB = 1 << 30
DEVICES_A_NODE = 8
REPEATS = 9
NOW = datetime(2030, 1, 1, tzinfo=UTC)
# Devices and GiB in all of one replica: from a small model to half a machine.
SIZES = ((1, 18), (1, 24), (1, 40), (2, 140), (1, 70), (4, 280), (1, 12))

STAGES = ("records", "books", "plan", "transactions")

Record = records_pb2.DeploymentRecord


def deployment(index: int, replicas: int, *, distinct: bool = False, gib: int = 0) -> Record:
    """A deployment of one of the sizes; `distinct` gives each need a figure of its own."""
    count, size = SIZES[index % len(SIZES)] if not gib else (1, gib)
    own_bytes = index * 4096 if distinct else 0
    return Record(
        namespace=f"team-{index % 20}",
        name=f"model-{index:05d}",
        uid=f"uid-{index}",
        generation=1,
        launch_generation=1,
        spec=deployment_pb2.DeploymentSpec(
            model=f"org/model-{index}", engine=types_pb2.ENGINE_VLLM, replicas=replicas
        ),
        sizing=sizing_pb2.Sizing(
            device_count=count,
            tensor_parallel=count,
            total_bytes=size * GIB + own_bytes,
            device_kinds=[types_pb2.DEVICE_KIND_NVIDIA],
        ),
    )


def machine(index: int, state: types_pb2.NodeState.ValueType) -> records_pb2.NodeObservationRecord:
    """A node with eight devices of 80 GiB."""
    return records_pb2.NodeObservationRecord(
        state=state,
        inventory=node_pb2.NodeInventory(
            node=f"node-{index:04d}",
            devices=[
                node_pb2.Device(id=f"gpu-{each}", kind=types_pb2.DEVICE_KIND_NVIDIA, memory_bytes=80 * GIB)
                for each in range(DEVICES_A_NODE)
            ],
            engines=[
                node_pb2.EngineEnvironment(
                    engine=types_pb2.ENGINE_VLLM, device_kinds=[types_pb2.DEVICE_KIND_NVIDIA]
                )
            ],
        ),
    )


class Bench:
    """A cluster of records and what the leader's loop does with it."""

    def __init__(self, store: MemoryStore, clock: ManualClock) -> None:
        self.store, self.clock = store, clock
        self.cluster = ClusterView(store, clock)
        self.planner = Planner()
        self.stages_ms: dict[str, float] = {}
        self.wall_ms = 0.0

    async def put(self, *operations: Operation) -> None:
        """Writes records and waits until the mirrors show them."""
        written: dict[str, int] = {}
        for start in range(0, len(operations), 100):
            chunk = list(operations[start : start + 100])
            commit = await self.store.commit(chunk)
            written.update({each.key: commit.revision for each in chunk})
        await self.cluster.wait_for(written, 10.0)

    def round(self) -> tuple[Plan, list[Operation]]:
        """One look of the loop, up to the commit."""
        self.stages_ms.clear()
        wall, started = time.perf_counter(), time.thread_time()
        changed = self.cluster.take_changes()
        view = self.cluster.take()
        taken = self._stage("records", started)
        touched = follow(self.planner.books, view, changed)
        followed = self._stage("books", taken)
        made = self.planner.plan(NOW, new_replica_id)
        planned = self._stage("plan", followed)
        transactions = translate(made, view, now=NOW, fencing_token=1, touched=touched)
        self._stage("transactions", planned)
        self.wall_ms = (time.perf_counter() - wall) * 1000
        return made, [operation for each in transactions for operation in each.operations]

    def _stage(self, name: str, began: float) -> float:
        now = time.thread_time()
        self.stages_ms[name] = (now - began) * 1000
        return now

    async def settle(self) -> None:
        """Carries plans out until nothing is left to do, and has every replica serve."""
        for _ in range(6):
            _, operations = self.round()
            if operations:
                await self.put(*operations)
            reports = [self.report(each) for each in self._unreported()]
            if not operations and not reports:
                return
            if reports:
                await self.put(*reports)

    def _unreported(self) -> Iterator[replica_pb2.ReplicaAssignment]:
        view = self.cluster.take()
        for key, each in view.assignments.items():
            if keys.ACTUAL_REPLICAS + key.removeprefix(keys.PLAN_REPLICAS) not in view.observations:
                yield each

    def report(self, assignment: replica_pb2.ReplicaAssignment, message: str = "") -> Put:
        """What an agent writes of a replica that serves."""
        observed = replica_pb2.ReplicaObservation(
            namespace=assignment.namespace,
            deployment=assignment.deployment,
            deployment_uid=assignment.deployment_uid,
            replica=assignment.replica,
            node=assignment.node,
            state=types_pb2.REPLICA_STATE_READY,
            state_time=to_timestamp(NOW),
            ready_time=to_timestamp(NOW),
            url=f"http://{assignment.node}:8000",
            healthy=True,
            message=message,
        )
        key = keys.actual_replica(assignment.namespace, assignment.deployment, assignment.replica)
        return Put(key, observed.SerializeToString())


def put_deployment(record: Record) -> Put:
    return Put(keys.spec_deployment(record.namespace, record.name), record.SerializeToString())


def put_node(index: int, state: types_pb2.NodeState.ValueType = types_pb2.NODE_STATE_READY) -> Put:
    record = machine(index, state)
    return Put(keys.actual_node(record.inventory.node), record.SerializeToString())


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


async def full_plans(options: argparse.Namespace) -> None:
    """Plans that look at everything, from nothing placed."""
    total = options.deployments * options.replicas
    mixes = (
        (
            f"{options.deployments} deployments of {options.replicas}",
            options.deployments,
            options.replicas,
            False,
        ),
        ("the same, no two needs alike", options.deployments, options.replicas, True),
        (f"{total // 100} deployments of 100", total // 100, 100, False),
        (f"{total} deployments of 1, no two needs alike", total, 1, True),
    )
    print(f"\n### Full plan: {options.nodes} nodes x {DEVICES_A_NODE} devices, nothing placed\n")
    row("mix", "placed", "pending", "median CPU s", "worst wall s")
    row("---", "---:", "---:", "---:", "---:")
    for name, deployments, replicas, distinct in mixes:
        clock = ManualClock()
        async with running(Bench(MemoryStore(clock), clock)) as bench:
            await bench.put(*(put_node(index) for index in range(options.nodes)))
            await bench.put(
                *(
                    put_deployment(deployment(each, replicas, distinct=distinct))
                    for each in range(deployments)
                )
            )
            snapshot = build_snapshot(bench.cluster.take())
        took, made = list[tuple[float, float]](), Plan()
        for _ in range(3):
            wall, began = time.perf_counter(), time.thread_time()
            made = plan(snapshot, NOW, new_replica_id)
            took.append((time.thread_time() - began, time.perf_counter() - wall))
        pending = sum(each.pending for each in made.conclusions)
        seconds = statistics.median(each for each, _ in took)
        row(name, len(made.place), pending, f"{seconds:.3f}", f"{max(each for _, each in took):.3f}")


async def rounds(options: argparse.Namespace) -> None:
    """Rounds of the loop after one change, with everything else settled."""
    clock = ManualClock()
    async with running(Bench(MemoryStore(clock), clock)) as bench:
        await bench.put(*(put_node(index) for index in range(options.nodes)))
        await bench.put(
            *(put_deployment(deployment(each, options.replicas)) for each in range(options.deployments))
        )
        await bench.settle()
        print(f"\n### Rounds of the loop: {options.nodes} nodes, {count(bench)} replicas serve\n")
        row(
            "what changed",
            "median CPU ms",
            "worst wall ms",
            "records",
            "books",
            "plan",
            "transactions",
            "writes",
        )
        row("---", *["---:"] * 7)
        await cold(bench)
        await changes(bench, options, first=options.deployments)
        # Four times what a node holds: they wait, whatever happens.
        waiting = [deployment(100_000 + each, 1, gib=320) for each in range(100)]
        await bench.put(*(put_deployment(each) for each in waiting))
        await bench.settle()
        print("\nThe same while 100 deployments wait for room:\n")
        row(
            "what changed",
            "median CPU ms",
            "worst wall ms",
            "records",
            "books",
            "plan",
            "transactions",
            "writes",
        )
        row("---", *["---:"] * 7)
        await changes(bench, options, first=200_000)
        if options.profile:
            await profile(bench)


def count(bench: Bench) -> int:
    return len(bench.cluster.take().observations)


async def cold(bench: Bench) -> None:
    """The first round of a new leader, which reads everything."""
    bench.planner = Planner()
    bench.cluster.forget_changes()
    _, operations = bench.round()
    show("nothing: first look of a new leader", [dict(bench.stages_ms)], [bench.wall_ms], len(operations))


async def changes(bench: Bench, options: argparse.Namespace, *, first: int) -> None:
    """Each kind of change, several times."""
    index = itertools.count(first)
    assignments = sorted(bench.cluster.take().assignments.values(), key=lambda each: each.replica)
    replica = iter(assignments)

    async def reported() -> None:
        await bench.put(bench.report(next(replica), message="still serving"))

    async def declared() -> None:
        await bench.put(put_deployment(deployment(next(index), 1)))

    async def scaled() -> None:
        record = Record()
        record.CopyFrom(deployment(next(index) % options.deployments, options.replicas + 1))
        record.generation = 2 + next(index)
        await bench.put(put_deployment(record))

    async def lost() -> None:
        await bench.put(put_node(next(index) % options.nodes, types_pb2.NODE_STATE_LOST))

    kinds: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
        ("a report of one replica", reported),
        ("one deployment declared", declared),
        ("one deployment scaled by 1", scaled),
        ("one node lost, its replicas placed elsewhere", lost),
    )
    for name, change in kinds:
        stages, walls, writes = list[dict[str, float]](), list[float](), 0
        for _ in range(REPEATS):
            await change()
            _, operations = bench.round()
            stages.append(dict(bench.stages_ms))
            walls.append(bench.wall_ms)
            writes = max(writes, len(operations))
            if operations:
                await bench.put(*operations)
            await bench.settle()
        show(name, stages, walls, writes)


def heading() -> None:
    row("what changed", "median CPU ms", "worst wall ms", *STAGES, "writes")
    row("---", *["---:"] * (3 + len(STAGES)))


def show(name: str, stages: list[dict[str, float]], walls: list[float], writes: int) -> None:
    totals = [sum(each.values()) for each in stages]
    parts = [f"{statistics.median(each[stage] for each in stages):.1f}" for stage in stages[0]]
    row(name, f"{statistics.median(totals):.1f}", f"{max(walls):.1f}", *parts, writes)


async def profile(bench: Bench) -> None:
    """Where the time of a round with one declaration goes."""
    await bench.put(put_deployment(deployment(300_000, 1)))
    profiler = cProfile.Profile()
    profiler.enable()
    bench.round()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(20)
    print(text.getvalue())


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    """Runs a bench's mirrors for a while."""
    mirrors = asyncio.create_task(bench.cluster.run(), name="bench-mirrors")
    try:
        await bench.cluster.wait_synced(10.0)
        yield bench
    finally:
        await cancel_and_wait(mirrors)
        await bench.store.close()


async def _main(options: argparse.Namespace) -> None:
    await full_plans(options)
    await rounds(options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--deployments", type=int, default=500)
    parser.add_argument("--replicas", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="show where a round spends its time")
    asyncio.run(_main(parser.parse_args()))
