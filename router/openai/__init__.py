"""The OpenAI-compatible face of the router: routes, errors, server-sent events."""
