"""Ground floor of Millrace, shared by control plane, node agent and router.

It holds what all three need and none owns: errors, clock, tasks, back-off, identity, logging,
telemetry, gRPC plumbing and the store. It knows nothing of scheduling, engines or routing.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("millrace")
except PackageNotFoundError:
    VERSION = "0.0.0+source"
