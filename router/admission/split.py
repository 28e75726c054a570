"""Which deployment behind an alias gets a request: shares by weight.

    with a session   weighted rendezvous hashing: the greatest -w / ln(u) wins, u the hash of both, in (0, 1);
                     every router sends a session to the same place, and a changed weight moves no more
                     sessions than it has to (D. Thaler, C. Ravishankar, 1998; weights after C. Schindelhauer,
                     G. Schomaker, 2005)
    without          smooth weighted turns: each target gains its weight, the richest goes and pays the sum

In come an alias, the deployments that exist and a session, out comes the name of one of them. The turns are
this worker's own; nothing is asked. A target that does not exist gets nothing, and its share goes to the
others.
"""

import math
from collections.abc import Container

import xxhash

from router.view.view import Alias, Target, View

_HASH_RANGE = 2**64


class Splitter:
    """Splits requests for aliases; bounded by `retain`."""

    def __init__(self) -> None:
        self._turns: dict[tuple[str, str], dict[str, int]] = {}

    def choose(self, namespace: str, alias: Alias, existing: Container[str], session: str) -> str | None:
        """Returns the deployment for a request; None where no target exists.

        Args:
            namespace: Tenant.
            alias: What the client named.
            existing: Deployments of the tenant.
            session: What the client calls its session; empty for none.
        """
        targets = [each for each in alias.targets if each.deployment in existing]
        if len(targets) < 2:
            return targets[0].deployment if targets else None
        if session:
            return max(targets, key=lambda each: _claim(each, session)).deployment
        return self._next(self._turns.setdefault((namespace, alias.name), {}), targets)

    @staticmethod
    def _next(credits_of: dict[str, int], targets: list[Target]) -> str:
        if credits_of.keys() != {each.deployment for each in targets}:
            credits_of.clear()
        for each in targets:
            credits_of[each.deployment] = credits_of.get(each.deployment, 0) + each.weight
        richest = max(targets, key=lambda each: credits_of[each.deployment]).deployment
        credits_of[richest] -= sum(each.weight for each in targets)
        return richest

    def retain(self, view: View) -> None:
        """Forgets the turns of aliases that are gone."""
        self._turns = {
            (namespace, name): turns
            for (namespace, name), turns in self._turns.items()
            if (tenant := view.tenants.get(namespace)) is not None and name in tenant.aliases
        }


def _claim(target: Target, session: str) -> float:
    digest = xxhash.xxh64_intdigest(f"{target.deployment}\0{session}".encode())
    return -target.weight / math.log((digest + 0.5) / _HASH_RANGE)
