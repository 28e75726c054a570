"""Where an engine of ours publishes its KV events: the argument that both vLLM and its look-alike take.

In: a deployment's `extra_args`, the engine's port, the agent's folder for sockets. Out: the value of
`--kv-events-config`, or None where events are not asked for. They are off unless `kv_events` is true:
an engine pays for them, and they hold the prompts' token ids. So they travel over Unix sockets that only
the agent's user can open; engines with data-parallel ranks cannot use those and get TCP ports that the
engine chooses on the address that the agent gives it.
"""

import json
from pathlib import Path

from google.protobuf.struct_pb2 import Struct

from nodeagent.engines.arguments import struct_to_dict
from nodeagent.engines.base import CannotStart

# Belongs to Millrace and must not reach an engine as a flag.
OPTION = "kv-events"
# The kernel's limit is 107 bytes.
_PATH_BYTES_MAX = 100


def kv_events_config(extra: Struct, *, port: int, socket_directory: Path | None) -> str | None:
    """Works out `--kv-events-config`.

    Raises:
        CannotStart: `kv_events` is no boolean, or the folder's path is too long for a socket.
    """
    arguments = {key.replace("_", "-"): value for key, value in struct_to_dict(extra).items()}
    wanted = arguments.get(OPTION)
    if wanted is None or wanted is False:
        return None
    if wanted is not True:
        raise CannotStart(f"extra_args.kv_events must be true or false, not {wanted!r}")
    ranks = arguments.get("data-parallel-size", 1)
    if ranks != 1 or socket_directory is None:
        endpoint = replay_endpoint = "tcp://*:0"
    else:
        endpoint, replay_endpoint = (f"ipc://{socket_directory}/{port}.{each}" for each in ("kv", "replay"))
        if len(replay_endpoint) > _PATH_BYTES_MAX:
            raise CannotStart(f"{socket_directory} is too long for a socket: set a shorter --data-directory")
        socket_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    configuration = {
        "enable_kv_cache_events": True,
        "endpoint": endpoint,
        "replay_endpoint": replay_endpoint,
    }
    return json.dumps(configuration, separators=(",", ":"))
