"""`python -m deploy.etcd`: prepares, secures and, for trying things out, runs a three-member etcd.

    prepare --member NAME=HOST[:CLIENT_PORT:PEER_PORT] (three times)   certificates, configuration, passwords
    secure  --member ... (the same)                                    users, roles, authentication on
    run                                                                three members on this machine

In comes a command line, out come files below --directory and lines that say what to do next.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from core import logging
from deploy.etcd.certificates import OpensslError
from deploy.etcd.layout import CLIENT_PORT, METRICS_PORT, PEER_PORT, Layout, Member
from deploy.etcd.members import MemberProcess, StartError
from deploy.etcd.prepare import prepare
from deploy.etcd.users import EtcdctlError, secure

# Beside the single member of `make up` and a system etcd.
LOCAL_PORT = 23790
LOCAL_STEP = 10


def parse_member(text: str) -> Member:
    """Reads `NAME=HOST` or `NAME=HOST:CLIENT_PORT:PEER_PORT`."""
    name, separator, address = text.partition("=")
    parts = address.split(":")
    if not separator or not name or not parts[0] or len(parts) not in {1, 3}:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=HOST or NAME=HOST:CLIENT_PORT:PEER_PORT")
    if not all(part.isdigit() and 0 < int(part) < 65536 for part in parts[1:]):
        raise argparse.ArgumentTypeError(f"{text}: ports are numbers from 1 to 65535")
    client, peer = (int(part) for part in parts[1:]) if len(parts) == 3 else (CLIENT_PORT, PEER_PORT)
    return Member(name, parts[0], client, peer, METRICS_PORT)


def local_members(first_port: int) -> tuple[Member, ...]:
    """Returns three members on this machine."""
    return tuple(
        Member(f"etcd-{number}", "127.0.0.1", port, port + 1, port + 2)
        for number, port in enumerate(range(first_port, first_port + 3 * LOCAL_STEP, LOCAL_STEP), 1)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 1 with one line on standard error."""
    options = _parser().parse_args(arguments)
    logging.configure(service="etcd", level="WARNING", style="auto")
    directory: Path = options.directory
    try:
        if options.command == "run":
            return _run(directory, local_members(options.first_port))
        members = tuple(options.member)
        if options.command == "prepare":
            prepare(directory, members)
            print(f"prepared {directory}; copy members/NAME to each machine, clients/USER to its processes")
        else:
            secure(Layout(directory), [each.client_endpoint for each in members])
            print("users controlplane and router may do what they need, everybody else nothing")
    except (OpensslError, EtcdctlError, StartError, ValueError, OSError) as error:
        sys.stderr.write(f"etcd: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.etcd", description="A secure three-member etcd.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("prepare", "make certificates, configuration files and passwords; safe to run again"),
        ("secure", "make users and roles and turn authentication on; safe to run again"),
        ("run", "run three members on this machine until Ctrl-C"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--directory", type=Path, default=Path(".millrace/etcd-cluster"))
        if name == "run":
            command.add_argument("--first-port", type=int, default=LOCAL_PORT)
        else:
            command.add_argument(
                *("--member",), type=parse_member, action="append", required=True, metavar="NAME=HOST"
            )
    return parser


def _run(directory: Path, members: tuple[Member, ...]) -> int:
    layout = prepare(directory, members)
    processes = [MemberProcess(layout, each) for each in members]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.stop)
            process.spawn()
        for process in processes:
            process.wait_healthy()
        endpoints = [each.client_endpoint for each in members]
        secure(layout, endpoints)
        print(_options(layout, endpoints), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            for process in processes:
                process.wait_exit()
            return 1
    return 0


def _options(layout: Layout, endpoints: Sequence[str]) -> str:
    folder = layout.client("controlplane")
    return (
        "three members run; options of the control plane and, with clients/router, of routers:\n"
        f"  --etcd-endpoints={','.join(endpoints)}\n"
        f"  --etcd-tls-ca={folder / 'ca.pem'}\n"
        f"  --etcd-tls-certificate={folder / 'client.pem'}\n"
        f"  --etcd-tls-key={folder / 'client.key'}"
    )


if __name__ == "__main__":
    sys.exit(main())
