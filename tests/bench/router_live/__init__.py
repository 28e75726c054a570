"""Live benchmarks of the router: real processes, pinned to cores, beside its peers in the same run."""
