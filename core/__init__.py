"""Ground floor of Millrace, shared by control plane, node agent and router.

It holds what all three need and none owns: errors, clock, tasks, back-off, identity, logging,
telemetry, gRPC plumbing and the store. It knows nothing of scheduling, engines or routing.
"""

VERSION: str


def __getattr__(name: str) -> str:
    # Reading the version takes longer than all else that a simulated engine needs of this package.
    if name != "VERSION":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("millrace")
    except PackageNotFoundError:
        return "0.0.0+source"
