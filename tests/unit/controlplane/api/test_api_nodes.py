"""Nodes: pages, cordon, drain, versions."""

from collections.abc import AsyncIterator

import pytest_asyncio
from millrace.core.v1 import replica_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from core.errors import Conflict, NotFound
from core.store import Put, keys
from tests.support.api_harness import ApiHarness, running_api


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


async def test_unknown_node_is_not_found(api: ApiHarness) -> None:
    assert isinstance(await api.refusal("GetNode", messages.GetNodeRequest(name="x")), NotFound)
    error = await api.refusal("CordonNode", messages.CordonNodeRequest(name="x", cordoned=True))
    assert isinstance(error, NotFound)
    assert not (await api.store.list(keys.SPEC_NODES)).items


async def test_pages_of_nodes(api: ApiHarness) -> None:
    for index in range(3):
        await api.add_node(f"node-{index}")
    first = await api.call("ListNodes", messages.ListNodesRequest(page_size=2))
    second = await api.call(
        "ListNodes", messages.ListNodesRequest(page_size=2, page_token=first.next_page_token)
    )
    assert [each.name for each in (*first.nodes, *second.nodes)] == ["node-0", "node-1", "node-2"]
    assert second.next_page_token == ""


async def test_drain_names_what_moves_and_uncordon_takes_it_back(api: ApiHarness) -> None:
    await api.add_node()
    assignment = replica_pb2.ReplicaAssignment(namespace="team", deployment="a", replica="a-1", node="node-1")
    key = keys.plan_replica("team", "a", "a-1")
    commit = await api.store.commit([Put(key, assignment.SerializeToString())])
    await api.view.assignments.wait_for_revision(commit.revision, 5)
    drained = await api.call("DrainNode", messages.DrainNodeRequest(name="node-1"))
    assert list(drained.moving) == ["team/a"]
    assert drained.node.spec.cordoned
    assert drained.node.spec.draining
    assert list(drained.node.status.replicas) == ["a-1"]
    still = await api.call("CordonNode", messages.CordonNodeRequest(name="node-1", cordoned=True))
    assert still.node.spec.draining
    back = await api.call("CordonNode", messages.CordonNodeRequest(name="node-1", cordoned=False))
    assert not back.node.spec.cordoned
    assert not back.node.spec.draining


async def test_versions_and_dry_runs(api: ApiHarness) -> None:
    await api.add_node()
    dry = await api.call(
        "CordonNode", messages.CordonNodeRequest(name="node-1", cordoned=True, validate_only=True)
    )
    assert dry.node.spec.cordoned
    assert not (await api.store.list(keys.SPEC_NODES)).items
    first = await api.call("CordonNode", messages.CordonNodeRequest(name="node-1", cordoned=True, etag="0"))
    error = await api.refusal("DrainNode", messages.DrainNodeRequest(name="node-1", etag="0"))
    assert isinstance(error, Conflict)
    assert error.metadata["current_etag"] == first.node.etag
    got = await api.call("GetNode", messages.GetNodeRequest(name="node-1"))
    assert got.node == first.node
