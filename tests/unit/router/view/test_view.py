"""Building the view: who a key is, what a model name means, in which order endpoints stand."""

import pytest
from google.protobuf import duration_pb2
from hypothesis import given
from hypothesis import strategies as st
from millrace.core.v1 import deployment_pb2, endpoint_pb2, policy_pb2, types_pb2
from millrace.state.v1 import records_pb2

from core.identity import hash_secret
from core.store import keys
from router.view.view import (
    Alias,
    Deployment,
    EndpointState,
    Miss,
    Routing,
    Target,
    Tier,
    View,
    build_view,
    endpoint_of,
)

KEY_HASH = hash_secret("sk-1")


def _deployment(name: str, model: str = "org/m", namespace: str = "a") -> records_pb2.DeploymentRecord:
    return records_pb2.DeploymentRecord(
        namespace=namespace, name=name, spec=deployment_pb2.DeploymentSpec(model=model)
    )


def _endpoint(replica: str, deployment: str = "d1", namespace: str = "a") -> endpoint_pb2.Endpoint:
    return endpoint_pb2.Endpoint(
        namespace=namespace, deployment=deployment, replica=replica, url="http://h:1/", incarnation="i"
    )


def _view(
    *deployments: records_pb2.DeploymentRecord, endpoints: list[endpoint_pb2.Endpoint] | None = None
) -> View:
    record = records_pb2.ApiKeyRecord(key_hash=KEY_HASH, namespace="a")
    return build_view(
        version=1,
        endpoints=endpoints or [],
        api_keys={keys.spec_key(KEY_HASH): record},
        deployments=deployments,
    )


def _resolve(view: View, model: str) -> "str | Miss":
    opened = view.authenticate(KEY_HASH)
    assert opened is not None
    found = opened[1].resolve(model)
    return found if isinstance(found, Miss) else found.name


@pytest.mark.parametrize(
    ("deployments", "model", "expected"),
    [
        ([_deployment("d1")], "d1", "d1"),
        ([_deployment("d1")], "org/m", "d1"),
        ([_deployment("d1")], "d2", Miss.UNKNOWN),
        ([_deployment("d1")], "", Miss.UNKNOWN),
        ([], "d1", Miss.UNKNOWN),
        ([_deployment("d1"), _deployment("d2")], "org/m", Miss.AMBIGUOUS),
        ([_deployment("d1"), _deployment("d2")], "d2", "d2"),
        # Ambiguity within another namespace is none here.
        ([_deployment("d1"), _deployment("d2", namespace="b")], "org/m", "d1"),
        # A name wins over a declared model id.
        ([_deployment("d1", "d2"), _deployment("d2", "org/m")], "d2", "d2"),
        ([_deployment("d1", namespace="b")], "d1", Miss.UNKNOWN),
    ],
)
def test_resolve(deployments: list[records_pb2.DeploymentRecord], model: str, expected: "str | Miss") -> None:
    assert _resolve(_view(*deployments), model) == expected


def test_only_a_key_under_its_own_hash_opens_its_namespace() -> None:
    other = hash_secret("sk-2")
    view = build_view(
        version=1,
        endpoints=[],
        api_keys={
            keys.spec_key(KEY_HASH): records_pb2.ApiKeyRecord(key_hash=KEY_HASH, namespace="a"),
            keys.spec_key(other): records_pb2.ApiKeyRecord(key_hash=KEY_HASH, namespace="b"),
            keys.spec_key("x"): records_pb2.ApiKeyRecord(key_hash="x"),
        },
        deployments=[],
    )
    found = view.authenticate(KEY_HASH)
    assert found is not None
    _, tenant = found
    assert tenant is not None
    assert tenant.name == "a"
    assert view.authenticate(other) is None
    assert view.authenticate("x") is None
    assert View().authenticate(KEY_HASH) is None


@given(st.permutations([_endpoint(f"d1-{n}") for n in range(5)]))
def test_endpoints_stand_in_the_order_of_their_replicas(endpoints: list[endpoint_pb2.Endpoint]) -> None:
    deployment = _view(_deployment("d1"), endpoints=endpoints).deployment("a", "d1")
    assert deployment is not None
    assert [each.replica for each in deployment.endpoints] == [f"d1-{n}" for n in range(5)]


def test_endpoint_without_a_declaration_serves_nobody() -> None:
    view = _view(_deployment("d1"), endpoints=[_endpoint("x", deployment="gone")])
    assert _resolve(view, "gone") is Miss.UNKNOWN
    assert view.deployment("a", "gone") is None


def test_view_cannot_be_changed() -> None:
    view = _view(_deployment("d1"))
    with pytest.raises(AttributeError):
        view.version = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        view.api_keys["x"] = view.api_keys[KEY_HASH]  # type: ignore[index]
    with pytest.raises(TypeError):
        view.tenants["a"].deployments["x"] = view.tenants["a"].deployments["d1"]  # type: ignore[index]


def test_endpoint_of_reads_what_is_missing_as_unknown() -> None:
    record = _endpoint("r")
    read = endpoint_of(record)
    assert (read.url, read.weight, read.state) == ("http://h:1", 1, EndpointState.UNSPECIFIED)
    later_version = endpoint_pb2.Endpoint.FromString(record.SerializeToString() + b"\x38\x63")
    assert endpoint_of(later_version).state is EndpointState.UNSPECIFIED


def test_creation_time_is_left_out_where_it_is_unknown() -> None:
    deployment = _view(_deployment("d1")).deployment("a", "d1")
    assert deployment is not None
    assert deployment.create_time_seconds is None


def test_routing_aliases_and_tiers_are_read() -> None:
    spec = deployment_pb2.DeploymentSpec(
        replicas=0,
        routing=policy_pb2.Routing(
            strategy=" random ",
            circuit_breaker=policy_pb2.CircuitBreaker(
                consecutive_failures=0, ejection=duration_pb2.Duration(seconds=3)
            ),
            stream_continuation=True,
            fallback_deployment="small",
            queue_requests_max=0,
            queue_timeout=duration_pb2.Duration(nanos=500_000_000),
        ),
    )
    scaled = deployment_pb2.DeploymentSpec(replicas=0, autoscale=policy_pb2.Autoscale(max_replicas=2))
    alias = policy_pb2.ModelAlias(
        name="chat",
        targets=[
            policy_pb2.AliasTarget(deployment="one", weight=3),
            policy_pb2.AliasTarget(deployment="two"),
        ],
    )
    shadowed = policy_pb2.ModelAlias(name="one", targets=alias.targets)
    key = records_pb2.ApiKeyRecord(key_hash=KEY_HASH, namespace="a", tier=types_pb2.TIER_FAST)
    view = build_view(
        version=1,
        endpoints=[],
        api_keys={keys.spec_key(KEY_HASH): key},
        deployments=[
            records_pb2.DeploymentRecord(namespace="a", name="one", spec=spec),
            records_pb2.DeploymentRecord(namespace="a", name="two", spec=scaled),
        ],
        namespaces=[
            records_pb2.NamespaceRecord(
                namespace="a",
                spec=policy_pb2.NamespaceSpec(aliases=[alias, shadowed, policy_pb2.ModelAlias(name="x")]),
            )
        ],
    )
    opened = view.authenticate(KEY_HASH)
    assert opened is not None
    assert opened[0].tier is Tier.FAST
    one, two = (opened[1].resolve(name) for name in ("one", "two"))
    assert isinstance(one, Deployment)
    assert isinstance(two, Deployment)
    assert one.routing == Routing("random", 1, 3.0, True, "small", 0, 0.5)
    assert two.routing == Routing()
    # A stopped deployment stays stopped; one that is scaled to zero comes back.
    assert (one.wanted, two.wanted) == (False, True)
    assert opened[1].resolve("chat") == Alias("chat", (Target("one", 3), Target("two", 1)))
    assert opened[1].resolve("x") is Miss.UNKNOWN


def test_a_start_belongs_to_the_deployment_that_it_was_measured_for() -> None:
    record = _deployment("d1")
    record.uid = "new"

    def start_of(uid: str) -> float | None:
        took = duration_pb2.Duration(seconds=42, nanos=500_000_000)
        served = records_pb2.ServedDeploymentRecord(
            namespace="a", name="d1", deployment_uid=uid, start_duration=took
        )
        view = build_view(version=1, endpoints=[], api_keys={}, deployments=[record], served=[served])
        deployment = view.deployment("a", "d1")
        assert deployment is not None
        return deployment.start_seconds

    assert start_of("new") == 42.5
    assert start_of("old") is None
