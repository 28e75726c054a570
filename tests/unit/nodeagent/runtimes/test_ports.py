"""Ports: in turn, none that is taken, an end to the range."""

import socket

import pytest

from nodeagent.engines.base import CannotStart
from nodeagent.runtimes.ports import PortAllocator


def test_ports_go_round_and_a_freed_one_is_not_next() -> None:
    ports = PortAllocator(25100, 25104, "127.0.0.1", start=0)
    first = ports.allocate()
    ports.release(first)
    assert ports.allocate() != first


def test_listeners_and_reserved_ports_are_passed_over() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(CannotStart, match="no free port"):
            PortAllocator(port, port, "127.0.0.1").allocate()
    ports = PortAllocator(port, port, "127.0.0.1")
    ports.reserve(port)
    with pytest.raises(CannotStart):
        ports.allocate()
    ports.release(port)
    assert ports.allocate() == port
