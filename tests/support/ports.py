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


def consecutive_ports(count: int) -> int:
    """Finds a row of ports that are free now and returns the first.

    Raises:
        RuntimeError: No such row was found; the machine has hardly any free port.
    """
    for first in (port for port in free_ports(64) if port + count <= 65_536):
        try:
            for port in range(first, first + count):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
    raise RuntimeError(f"no {count} consecutive free ports on 127.0.0.1")
