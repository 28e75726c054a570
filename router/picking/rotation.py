"""Taking turns among endpoints, whatever comes and goes.

In come candidates in any number, out comes the one whose turn it is: the next replica id, in order,
after the one that was chosen last for the same deployment. There is no index that a changed list could
reset or skew.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate

# Far more deployments than one router serves; beyond it all are forgotten and merely start their turns over.
_DEPLOYMENTS_MAX = 10_000


class Rotation:
    """Remembers whose turn it was."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], str] = {}

    def next(self, candidates: Sequence[Candidate]) -> Candidate:
        """Returns the candidate whose turn it is; all belong to one deployment, and there is one."""
        endpoint = candidates[0].endpoint
        replica = self.next_replica(
            (endpoint.namespace, endpoint.deployment), [each.endpoint.replica for each in candidates]
        )
        return next(each for each in candidates if each.endpoint.replica == replica)

    def next_replica(self, deployment: tuple[str, str], replicas: Sequence[str]) -> str:
        """Returns the replica whose turn it is.

        Args:
            deployment: Namespace and name.
            replicas: At least one, in any order.
        """
        last = self.last(deployment)
        chosen = min([each for each in replicas if each > last] or replicas)
        self.took(deployment, chosen)
        return chosen

    def last(self, deployment: tuple[str, str]) -> str:
        """Returns the replica that had its turn last; empty for none."""
        return self._last.get(deployment, "")

    def took(self, deployment: tuple[str, str], replica: str) -> None:
        """Notes who had his turn."""
        if len(self._last) >= _DEPLOYMENTS_MAX:
            self._last.clear()
        self._last[deployment] = replica
