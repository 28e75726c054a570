"""What each namespace holds, against its quota.

In come placements as they are made and undone, out come the counts and, where a quota would be exceeded,
the sentence that says so. A device that several replicas of a namespace share counts once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from controlplane.scheduler.structs import Claim, Need, Quota

_UNBOUNDED = Quota()


@dataclass(slots=True)
class _Held:
    replicas: int = 0
    devices: dict[str, dict[str, int]] = field(default_factory=dict)
    """Node to device to the number of replicas on it."""
    device_count: int = 0


class Usage:
    """Replicas and devices held by each namespace; draining replicas and reserved room count too.

    Attributes:
        quotas: By namespace.
    """

    def __init__(self) -> None:
        self.quotas: dict[str, Quota] = {}
        self._held: dict[str, _Held] = {}

    def take(self, namespace: str, node: str, claims: Iterable[Claim]) -> None:
        """Counts a replica."""
        held = self._held.setdefault(namespace, _Held())
        held.replicas += 1
        for each in claims:
            devices = held.devices.setdefault(node, {})
            count = devices.get(each.device_id, 0)
            devices[each.device_id] = count + 1
            held.device_count += count == 0

    def give(self, namespace: str, node: str, claims: Iterable[Claim]) -> None:
        """Takes a replica out of the count."""
        held = self._held[namespace]
        held.replicas -= 1
        for each in claims:
            devices = held.devices[node]
            devices[each.device_id] -= 1
            if not devices[each.device_id]:
                del devices[each.device_id]
                held.device_count -= 1
            if not devices:
                del held.devices[node]
        if not held.replicas:
            del self._held[namespace]

    def replicas(self, namespace: str) -> int:
        """Replicas that a namespace holds."""
        held = self._held.get(namespace)
        return held.replicas if held is not None else 0

    def devices(self, namespace: str) -> int:
        """Devices that a namespace holds."""
        held = self._held.get(namespace)
        return held.device_count if held is not None else 0

    def held_on(self, namespace: str) -> Mapping[str, Mapping[str, int]]:
        """Devices that a namespace holds, by node."""
        held = self._held.get(namespace)
        return held.devices if held is not None else {}

    def devices_left(self, namespace: str) -> int | None:
        """Devices that it may still take; None is unbounded, and a quota that was lowered leaves none."""
        limit = self.quotas.get(namespace, _UNBOUNDED).devices
        return None if limit is None else max(0, limit - self.devices(namespace))

    def new_devices(self, namespace: str, node: str, claims: Iterable[Claim]) -> int:
        """Devices among some that the namespace does not hold yet."""
        on_node = self.held_on(namespace).get(node, {})
        return sum(1 for each in claims if each.device_id not in on_node)

    def allows(self, namespace: str, node: str, claims: Iterable[Claim]) -> bool:
        """True when one more replica there stays within the quota."""
        left = self.devices_left(namespace)
        return not self.replicas_spent(namespace) and (
            left is None or self.new_devices(namespace, node, claims) <= left
        )

    def replicas_spent(self, namespace: str) -> bool:
        """True when no further replica is allowed, wherever it went."""
        limit = self.quotas.get(namespace, _UNBOUNDED).replicas
        return limit is not None and self.replicas(namespace) >= limit

    def refusal(self, namespace: str, need: Need) -> str:
        """Says with counts which quota stands in the way of one more replica; empty when none does.

        A quota on devices stands in the way where fewer are left than the replica needs, even though
        devices that the namespace holds may still have room for it.
        """
        quota = self.quotas.get(namespace, _UNBOUNDED)
        if quota.replicas is not None and self.replicas_spent(namespace):
            return f"quota of {namespace}: {self.replicas(namespace)} of {quota.replicas} replicas"
        left = self.devices_left(namespace)
        if left is not None and need.device_count > left:
            more = f", {need.device_count} needed" if need.device_count > 1 else ""
            return f"quota of {namespace}: {self.devices(namespace)} of {quota.devices} devices{more}"
        return ""
