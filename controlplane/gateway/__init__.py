"""The same API over HTTP: JSON in and out, OpenAPI, a WebSocket.

The gateway is a gRPC client of the control plane's own SchedulerService, with the caller's credential:
rules and rights stand in one place, and both doors refuse alike.
"""
