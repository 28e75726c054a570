"""A router takes over a listening socket from its parent, and nothing else."""

import os
import socket

import pytest

from router.server import PortTaken, inherit


def test_a_listening_socket_is_taken_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as parent:
        taken = inherit(os.dup(parent.fileno()))
        assert taken.getsockname() == parent.getsockname()
        assert not taken.getblocking()
        taken.close()


def test_a_socket_that_does_not_listen_is_refused() -> None:
    with socket.socket() as parent, pytest.raises(PortTaken, match="does not listen"):
        inherit(os.dup(parent.fileno()))


def test_a_file_is_refused() -> None:
    read, write = os.pipe()
    os.close(write)
    try:
        with pytest.raises(PortTaken, match="is no socket"):
            inherit(read)
    finally:
        os.close(read)
