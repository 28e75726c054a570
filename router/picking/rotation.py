"""Taking turns among endpoints, whatever comes and goes.

In come candidates in any number, out comes the one whose turn it is: the next replica id, in order,
after the one that was chosen last for the same deployment. There is no index that a changed list could
reset or skew.
"""

from collections import OrderedDict
from collections.abc import Sequence

from router.picking.contract import Candidate

# Far more deployments than one router serves; the one that was idle longest is forgotten and merely
# starts its turns over.
_DEPLOYMENTS_MAX = 10_000


class Rotation:
    """Remembers whose turn it was."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[str, str], str] = OrderedDict()

    def next(self, candidates: Sequence[Candidate]) -> Candidate:
        """Returns the candidate whose turn it is; all belong to one deployment, and there is one."""
        endpoint = candidates[0].endpoint
        key = (endpoint.namespace, endpoint.deployment)
        last = self._last.get(key, "")
        later = [each for each in candidates if each.endpoint.replica > last]
        chosen = min(later or candidates, key=lambda each: each.endpoint.replica)
        self._last[key] = chosen.endpoint.replica
        self._last.move_to_end(key)
        if len(self._last) > _DEPLOYMENTS_MAX:
            self._last.popitem(last=False)
        return chosen
