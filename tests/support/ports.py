"""Ports that are free now."""

import socket


def free_ports(count: int) -> list[int]:
    """Finds ports that are free now; all are held while the others are looked for."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
