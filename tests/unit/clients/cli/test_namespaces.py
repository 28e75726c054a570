"""`millrace namespace`: aliases and quotas, and `routing` in files."""

import json

from millrace.core.v1.policy_pb2 import Routing
from millrace_client.cli.policies import read_policy

from tests.support.fake_scheduler import FakeScheduler
from tests.unit.clients.conftest import CommandLine


async def test_aliases_and_quotas(millrace: CommandLine, scheduler: FakeScheduler) -> None:
    assert "no namespace has" in (await millrace("namespace")).stderr
    outcome = await millrace("namespace", "alias", "team-ai", "chat", "new=20", "old=80")
    assert (outcome.code, outcome.stdout) == (0, "team-ai: chat leads to new=20, old=80\n")
    await millrace("namespace", "alias", "team-ai", "org/other", "old")
    await millrace("namespace", "alias", "team-ai", "chat", "new=1", "old=1")
    outcome = await millrace("namespace", "quota", "team-ai", "--devices", "8")
    assert outcome.stdout == "team-ai may hold 8 devices\n"
    spec = scheduler.kept_namespaces["team-ai"].spec
    assert [(each.name, len(each.targets)) for each in spec.aliases] == [("chat", 2), ("org/other", 1)]
    assert spec.aliases[0].targets[0].weight == 1
    assert (spec.quota.devices, spec.quota.HasField("replicas")) == (8, False)
    shown = (await millrace("namespace", "get", "team-ai")).stdout
    assert "chat,org/other" in shown
    assert "ALIAS" in shown
    outcome = await millrace("namespace", "unalias", "team-ai", "chat", "-o", "json")
    assert [each["name"] for each in json.loads(outcome.stdout)["spec"]["aliases"]] == ["org/other"]
    assert (await millrace("namespace", "unalias", "team-ai", "chat")).code == 3
    assert (await millrace("namespace", "alias", "team-ai", "chat", "new=many")).code == 1
    outcome = await millrace("namespace", "quota", "team-ai")
    assert outcome.stdout == "team-ai may hold anything\n"
    assert not scheduler.kept_namespaces["team-ai"].spec.HasField("quota")


async def test_every_page_is_listed(millrace: CommandLine) -> None:
    for number in range(5):
        await millrace("namespace", "quota", f"team-{number}", "--replicas", "1")
    listed = json.loads((await millrace("namespace", "-o", "json")).stdout)["namespaces"]
    assert [each["name"] for each in listed] == [f"team-{number}" for number in range(5)]


def test_routing_in_a_file() -> None:
    told: list[tuple[str, str]] = []
    value = {"strategy": "random", "stream_continuation": True, "queue_timeout_seconds": 2}
    found = read_policy(value, Routing, "routing", lambda path, what: told.append((path, what)))
    assert (found.strategy, found.stream_continuation, found.queue_timeout.seconds) == ("random", True, 2)
    read_policy({"stream_continuation": 1}, Routing, "routing", lambda path, what: told.append((path, what)))
    assert told == [("routing.stream_continuation", "has to be true or false, not `1`")]
