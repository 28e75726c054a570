"""Compiles the router's hot path with mypyc: the same sources, the same behaviour, about 1.7 times as fast.

    python -m deploy.native            builds .millrace/native
    PYTHONPATH=.millrace/native millrace-router ...

In come the sources of `router/`, which mypy has checked; out comes a copy of the package in which the
compiled modules lie beside them. The copy is a tree of its own, so that nobody edits a source while Python
imports what was compiled from it earlier. Without it everything runs as plain Python: nothing here is needed
to install.
Must not: change a source, or leave a half-built tree where a whole one is expected.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TREE = REPOSITORY / ".millrace" / "native"

# What a request goes through. Not among them: classes that extend asyncio's or aiohttp's (mypyc gains
# nothing), runtime-checkable protocols (mypyc refuses them), generic dataclasses with slots (they fail at
# import) and what runs once (settings, supervisor, server).
MODULES = (
    "router/access_log.py",
    "router/admission/drain_rate.py",
    "router/admission/first_token.py",
    "router/admission/gate.py",
    "router/admission/lane.py",
    "router/admission/saturation.py",
    "router/attempts.py",
    "router/call.py",
    "router/candidates.py",
    "router/decisions/log.py",
    "router/decisions/why.py",
    "router/delivery.py",
    "router/director.py",
    "router/exchange.py",
    "router/metering/ask.py",
    "router/metering/request.py",
    "router/metering/stream.py",
    "router/metering/usage.py",
    "router/metering/whole.py",
    "router/metrics.py",
    "router/openai/body.py",
    "router/openai/events.py",
    "router/openai/multipart.py",
    "router/openai/surface.py",
    "router/picking/candidate.py",
    "router/picking/columns.py",
    "router/picking/compiled.py",
    "router/picking/decision.py",
    "router/picking/eligibility.py",
    "router/picking/full_cache_guard.py",
    "router/picking/highest_score.py",
    "router/picking/hot_spot_guard.py",
    "router/picking/least_cost.py",
    "router/picking/neutral.py",
    "router/picking/pending.py",
    "router/picking/prefill_ledger.py",
    "router/picking/request.py",
    "router/picking/rotation.py",
    "router/picking/round_robin.py",
    "router/picking/selector.py",
    "router/prefix/canonical.py",
    "router/prefix/chain.py",
    "router/prefix/index.py",
    "router/prefix/prompt.py",
    "router/prefix/rendezvous.py",
    "router/record.py",
    "router/serving.py",
    "router/upstream/answer.py",
    "router/upstream/budget.py",
    "router/upstream/connection.py",
    "router/upstream/failures.py",
    "router/upstream/forward.py",
    "router/upstream/headers.py",
    "router/upstream/health.py",
    "router/upstream/loads.py",
    "router/upstream/pool.py",
    "router/upstream/relay.py",
    "router/view/samples.py",
    "router/view/view.py",
    "router/wire/chunks.py",
    "router/wire/connection.py",
    "router/wire/deadlines.py",
    "router/wire/downstream.py",
    "router/wire/headers.py",
    "router/wire/outbox.py",
    "router/wire/request.py",
    "router/wire/request_head.py",
    "router/wire/response_head.py",
    "router/wire/task.py",
)

_SETUP = """
from mypyc.build import mypycify
from setuptools import setup

setup(
    name="millrace-native",
    packages=[],
    ext_modules=mypycify(["--config-file=pyproject.toml", *{modules!r}], opt_level="3", debug_level="0"),
)
"""


class BuildFailed(Exception):
    """mypyc or the C compiler refused a module; the text ends with their words."""


def build(tree: Path = TREE) -> None:
    """Builds the tree, in place of an earlier one.

    Raises:
        BuildFailed: mypyc or the compiler refused a module.
        FileNotFoundError: A module of the list is gone.
    """
    for module in MODULES:
        if not (REPOSITORY / module).is_file():
            raise FileNotFoundError(f"{module} is in the list of deploy/native and not in the repository")
    partial = tree.with_suffix(f".{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for package in ("core", "router"):
            shutil.copytree(
                REPOSITORY / package, partial / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(REPOSITORY / "pyproject.toml", partial)
        (partial / "setup.py").write_text(_SETUP.format(modules=list(MODULES)))
        environment = {**os.environ, "MYPYPATH": str(REPOSITORY / "protos"), "PYTHONPATH": str(partial)}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", "2"]
        outcome = subprocess.run(
            command, cwd=partial, env=environment, check=False, capture_output=True, text=True
        )
        if outcome.returncode != 0:
            raise BuildFailed("\n".join((outcome.stdout + outcome.stderr).strip().splitlines()[-20:]))
        shutil.rmtree(partial / "build")
        # `core` is there for mypyc to read; it runs from where it is installed.
        shutil.rmtree(partial / "core")
        shutil.rmtree(tree, ignore_errors=True)
        partial.rename(tree)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def outdated(tree: Path = TREE) -> str:
    """Tells why the tree does not stand for the present sources; empty where it does."""
    for source in sorted((REPOSITORY / "router").rglob("*.py")):
        module = source.relative_to(REPOSITORY)
        copied = tree / module
        if not copied.is_file():
            return f"{module} is not in {tree.relative_to(REPOSITORY)}"
        if copied.read_bytes() != source.read_bytes():
            return f"{module} has changed since {tree.relative_to(REPOSITORY)} was built"
    return ""


if __name__ == "__main__":
    if shutil.which(os.environ.get("CC", "cc")) is None:
        sys.exit("no C compiler: install gcc (apt install gcc libc6-dev) or set CC")
    try:
        build()
    except (BuildFailed, FileNotFoundError) as error:
        sys.exit(str(error))
    print(f"compiled: run with PYTHONPATH={TREE.relative_to(REPOSITORY)}, or `make test-native`")
