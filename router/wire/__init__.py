"""HTTP/1.1 at protocol level: what a request on the hot path goes through instead of aiohttp's layers."""
