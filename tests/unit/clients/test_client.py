import asyncio
import uuid
from contextlib import aclosing

import pytest
from millrace.core.v1.deployment_pb2 import DeploymentSpec
from millrace.core.v1.event_pb2 import Event
from millrace.core.v1.node_pb2 import Node
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace_client import BlockingClient, ChangeKind, MillraceClient, errors

from core import errors as server_errors
from tests.support.fake_scheduler import (
    ADMIN_TOKEN,
    VIEWER_TOKEN,
    FakeScheduler,
    ServedScheduler,
    serve_scheduler,
)
from tests.support.waiting import eventually


async def test_declared_deployment_can_be_read_changed_and_deleted(client: MillraceClient) -> None:
    response = await client.declare(
        [messages.DeclaredModel(name="qwen", model="/models/qwen", replicas=0)],
        namespace="team-ai",
        metadata={"teamId": "team-001"},
    )
    assert response.deployments[0].api_key.startswith("sk-")
    found = await client.get("team-ai", "qwen")
    assert found.metadata["teamId"] == "team-001"
    assert found.spec.HasField("replicas")
    assert found.spec.replicas == 0

    updated = await client.update(
        "team-ai", "qwen", DeploymentSpec(max_model_len=4096), fields=["max_model_len"], etag=found.etag
    )
    assert (updated.generation, updated.spec.max_model_len, updated.spec.model) == (2, 4096, "/models/qwen")
    assert (await client.scale("team-ai", "qwen", 3)).spec.replicas == 3
    await client.delete("team-ai", "qwen")
    with pytest.raises(errors.NotFound) as caught:
        await client.get("team-ai", "qwen")
    assert caught.value.reason == "ERROR_REASON_NOT_FOUND"
    assert caught.value.metadata == {"namespace": "team-ai", "deployment": "qwen"}


async def test_list_hides_pages(client: MillraceClient, scheduler: FakeScheduler) -> None:
    scheduler.page_size_max = 2
    for number in range(5):
        scheduler.add("team-ai", f"model-{number}")
        scheduler.nodes[f"node-{number}"] = Node(name=f"node-{number}")
    scheduler.add("other", "elsewhere")
    assert [each.name for each in await client.list("team-ai")] == [f"model-{number}" for number in range(5)]
    assert len(await client.list()) == 6
    assert [each.name for each in await client.nodes()] == [f"node-{number}" for number in range(5)]


async def test_field_violations_come_through(client: MillraceClient) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await client.declare([messages.DeclaredModel(name="x", model="/models/none")], namespace="team-ai")
    assert caught.value.violations == (
        errors.FieldViolation("models[0].model", "there is no such directory"),
    )
    assert caught.value.reason == "ERROR_REASON_MODEL_NOT_FOUND"
    assert caught.value.message == "models[0].model: there is no such directory"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (server_errors.AlreadyExists("x"), errors.AlreadyExists),
        (server_errors.Conflict("x"), errors.Conflict),
        (server_errors.FailedPrecondition("x"), errors.FailedPrecondition),
        (server_errors.OutOfRange("x"), errors.OutOfRange),
        (server_errors.ResourceExhausted("x"), errors.ResourceExhausted),
        (server_errors.PermissionDenied("x"), errors.PermissionDenied),
        (RuntimeError("secret detail"), errors.ServerFault),
    ],
)
async def test_every_status_has_its_error(
    client: MillraceClient,
    scheduler: FakeScheduler,
    raised: Exception,
    expected: type[errors.MillraceError],
) -> None:
    scheduler.fail_next("GetDeployment", raised)
    with pytest.raises(errors.MillraceError) as caught:
        await client.get("team-ai", "qwen")
    assert type(caught.value) is expected
    assert "secret detail" not in caught.value.message
    assert len(scheduler.requests["GetDeployment"]) == 1


async def test_only_unavailable_is_retried_with_the_same_request_id(
    client: MillraceClient, scheduler: FakeScheduler
) -> None:
    scheduler.add("team-ai", "qwen")
    scheduler.fail_next("ScaleDeployment", *[server_errors.Unavailable("store away")] * 2)
    assert (await client.scale("team-ai", "qwen", 2)).spec.replicas == 2
    identifiers = {each.request_id for each in scheduler.requests["ScaleDeployment"]}
    assert len(scheduler.requests["ScaleDeployment"]) == 3
    assert len(identifiers) == 1
    assert uuid.UUID(identifiers.pop()).version == 4


async def test_retries_are_bounded(client: MillraceClient, scheduler: FakeScheduler) -> None:
    scheduler.fail_next("GetDeployment", *[server_errors.Unavailable("store away")] * 50)
    with pytest.raises(errors.Unavailable, match="store away"):
        await client.get("team-ai", "qwen")
    assert len(scheduler.requests["GetDeployment"]) == 4


async def test_deadline_ends_a_call(served: ServedScheduler) -> None:
    served.fake.hanging.add("GetDeployment")
    async with MillraceClient.connect(served.target, ADMIN_TOKEN, timeout_seconds=0.1) as client:
        with pytest.raises(errors.DeadlineExceeded, match="in time"):
            await client.get("team-ai", "qwen")
    assert len(served.fake.requests["GetDeployment"]) == 1


async def test_refused_connection_is_said_in_plain_words() -> None:
    async with MillraceClient.connect("127.0.0.1:1") as client:
        with pytest.raises(
            errors.Unavailable, match=r"cannot reach the control plane at 127\.0\.0\.1:1: connection refused"
        ):
            await client.nodes()


async def test_credentials(served: ServedScheduler) -> None:
    async with MillraceClient.connect(served.target) as client:
        with pytest.raises(errors.Unauthenticated):
            await client.list()
    async with MillraceClient.connect(served.target, VIEWER_TOKEN) as client:
        assert await client.list() == ()
        with pytest.raises(errors.PermissionDenied) as caught:
            await client.delete("team-ai", "qwen")
        assert caught.value.metadata["required_role"] == "operator"


async def test_watch_resumes_after_a_cut_without_repeating(
    client: MillraceClient, scheduler: FakeScheduler
) -> None:
    scheduler.add("team-ai", "first")
    async with aclosing(client.watch("team-ai")) as changes:
        assert (await anext(changes)).kind is ChangeKind.CHANGED
        synced = await anext(changes)
        assert (synced.kind, synced.deployment) == (ChangeKind.SYNCED, None)
        scheduler.cut_watches()
        await eventually(lambda: scheduler.watching == 0)
        scheduler.add("team-ai", "second")
        scheduler.add("other", "not-watched")
        change = await anext(changes)
        assert change.deployment is not None
        assert change.deployment.name == "second"
        assert scheduler.requests["WatchDeployments"][-1].resource_version == synced.resource_version
        scheduler.remove(("team-ai", "first"))
        gone = await anext(changes)
        assert gone.deployment is not None
        assert (gone.kind, gone.deployment.name) == (ChangeKind.DELETED, "first")
    await eventually(lambda: scheduler.watching == 0)


async def test_watch_lists_again_when_its_version_is_gone(
    client: MillraceClient, scheduler: FakeScheduler
) -> None:
    scheduler.add("team-ai", "stays")
    scheduler.add("team-ai", "vanishes")
    async with aclosing(client.watch("team-ai")) as changes:
        for _ in range(3):
            await anext(changes)
        scheduler.cut_watches()
        await eventually(lambda: scheduler.watching == 0)
        scheduler.remove(("team-ai", "vanishes"))
        scheduler.compact()
        seen = [await anext(changes) for _ in range(3)]
    summary = [(each.kind, each.deployment.name if each.deployment else "") for each in seen]
    assert summary == [
        (ChangeKind.CHANGED, "stays"),
        (ChangeKind.DELETED, "vanishes"),
        (ChangeKind.SYNCED, ""),
    ]


async def test_watch_gives_up_when_patience_is_over(served: ServedScheduler) -> None:
    async with (
        MillraceClient.connect(served.target, ADMIN_TOKEN) as client,
        aclosing(client.watch(patience_seconds=0.5)) as changes,
    ):
        assert (await anext(changes)).kind is ChangeKind.SYNCED
        await served.server.server.stop(0)
        with pytest.raises(errors.Unavailable):
            await anext(changes)


async def test_watch_raises_what_cannot_be_resumed(client: MillraceClient, scheduler: FakeScheduler) -> None:
    scheduler.fail_next("WatchDeployments", server_errors.NotFound("no such namespace"))
    with pytest.raises(errors.NotFound):
        await anext(client.watch("nowhere"))


async def test_events_end_without_follow_and_resume_with_it(
    client: MillraceClient, scheduler: FakeScheduler
) -> None:
    scheduler.emit(Event(id="01", namespace="team-ai", deployment="qwen", reason="Declared"))
    scheduler.emit(Event(id="02", namespace="other", deployment="x", reason="Declared"))
    assert [each.id async for each in client.events("team-ai")] == ["01"]
    async with aclosing(client.events("team-ai", "qwen", follow=True)) as stream:
        assert (await anext(stream)).id == "01"
        pending = asyncio.create_task(anext(stream))
        await eventually(lambda: scheduler.watching_events == 1)
        scheduler.cut_watches()
        await eventually(lambda: len(scheduler.requests["WatchEvents"]) >= 3)
        scheduler.emit(Event(id="03", namespace="team-ai", deployment="qwen", reason="Ready"))
        assert (await pending).id == "03"


async def test_logs_are_retried_before_the_first_line(
    client: MillraceClient, scheduler: FakeScheduler
) -> None:
    scheduler.add("team-ai", "qwen")
    scheduler.log_lines["team-ai", "qwen"] = [
        messages.StreamDeploymentLogsResponse(replica="qwen-a", node="node-1", line=f"line {number}")
        for number in range(3)
    ]
    scheduler.fail_next("StreamDeploymentLogs", server_errors.Unavailable("agent away"))
    lines = [each.line async for each in client.logs("team-ai", "qwen", tail_lines=2)]
    assert lines == ["line 1", "line 2"]


async def test_nodes_are_cordoned_and_drained(client: MillraceClient, scheduler: FakeScheduler) -> None:
    scheduler.nodes["node-1"] = Node(name="node-1")
    assert (await client.cordon("node-1")).spec.cordoned
    assert (await client.drain("node-1")).node.spec.draining
    node = await client.cordon("node-1", cordoned=False)
    assert not node.spec.cordoned
    assert not node.spec.draining
    assert (await client.node("node-1")).name == "node-1"


async def test_blocking_client(served: ServedScheduler) -> None:
    served.fake.add("team-ai", "qwen")
    served.fake.emit(Event(id="01", namespace="team-ai"))
    served.fake.emit(Event(id="02", namespace="team-ai"))

    def work() -> tuple[list[str], list[str], str]:
        with BlockingClient(lambda: MillraceClient.connect(served.target, ADMIN_TOKEN)) as blocking:
            names = [each.name for each in blocking.run(lambda client: client.list())]
            events = [each.id for each in blocking.iterate(lambda client: client.events())]
            first = next(blocking.iterate(lambda client: client.events(follow=True))).id
            return names, events, first

    assert await asyncio.to_thread(work) == (["qwen"], ["01", "02"], "01")


async def test_watch_survives_a_restart_of_the_server(scheduler: FakeScheduler) -> None:
    async with serve_scheduler(scheduler) as first:
        port = first.server.port
        client = MillraceClient.connect(first.target, ADMIN_TOKEN)
        changes = client.watch()
        assert (await anext(changes)).kind is ChangeKind.SYNCED
    async with serve_scheduler(scheduler, port=port), client, aclosing(changes):
        scheduler.add("team-ai", "declared-meanwhile")
        change = await anext(changes)
        assert change.deployment is not None
        assert change.deployment.name == "declared-meanwhile"
        assert (await client.get("team-ai", "declared-meanwhile")).generation == 1
