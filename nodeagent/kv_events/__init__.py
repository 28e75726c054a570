"""Engines' KV events: read on the engine's own machine, mirrored, and offered to routers as a stream."""
