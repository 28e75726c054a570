"""The way to the engines: connections, load, passive health, retry budget, one attempt."""
