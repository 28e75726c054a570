"""The leader's loop: watches, takes a snapshot, has it planned, and commits the plan under guard."""

from controlplane.reconciler.endpoints import endpoints
from controlplane.reconciler.loop import Reconciler, ReconcilerSettings
from controlplane.reconciler.snapshot import build_snapshot
from controlplane.reconciler.view import ClusterView, View

__all__ = ["ClusterView", "Reconciler", "ReconcilerSettings", "View", "build_snapshot", "endpoints"]
