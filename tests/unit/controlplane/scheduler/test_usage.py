from controlplane.scheduler import Claim, Need, Quota
from controlplane.scheduler.usage import Usage
from core.states import DeviceKind, Engine

ONE = (Claim("gpu-0", 1),)
TWO = (Claim("gpu-0", 1), Claim("gpu-1", 1))


def need(devices: int) -> Need:
    return Need(Engine.VLLM, (DeviceKind.NVIDIA,), devices, devices)


def test_a_shared_device_counts_once_and_until_the_last_replica_leaves() -> None:
    usage = Usage()
    usage.take("team", "a", TWO)
    usage.take("team", "a", ONE)
    usage.take("team", "b", ONE)
    usage.take("other", "a", ONE)
    usage.take("team", "a", ())
    assert (usage.replicas("team"), usage.devices("team")) == (4, 3)
    usage.give("team", "a", TWO)
    assert (usage.replicas("team"), usage.devices("team")) == (3, 2)
    usage.give("team", "a", ONE)
    usage.give("team", "a", ())
    usage.give("team", "b", ONE)
    assert (usage.replicas("team"), usage.devices("team"), usage.devices("other")) == (0, 0, 1)


def test_a_refusal_counts_and_a_device_that_is_held_already_is_free_of_charge() -> None:
    usage = Usage()
    usage.quotas["team"] = Quota(devices=2, replicas=3)
    usage.take("team", "a", TWO)
    assert usage.refusal("team", need(1)) == "quota of team: 2 of 2 devices"
    assert usage.refusal("team", need(4)) == "quota of team: 2 of 2 devices, 4 needed"
    assert usage.allows("team", "a", ONE)
    assert not usage.allows("team", "b", ONE)
    usage.take("team", "a", ONE)
    usage.take("team", "a", ONE)
    assert usage.refusal("team", need(1)) == "quota of team: 3 of 3 replicas"
    assert not usage.allows("team", "a", ONE)
    usage.quotas["team"] = Quota(devices=1)
    assert usage.devices_left("team") == 0, "a quota that was lowered takes nothing away"
    assert usage.devices_left("nobody") is None
