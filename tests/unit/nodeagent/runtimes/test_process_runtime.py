"""Processes: environment, start, end, adoption, leftovers."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nodeagent.engines.base import CannotStart, LaunchCommand
from nodeagent.runtimes.base import ProcessIdentity
from nodeagent.runtimes.process import ProcessRuntime, child_environment, describe_exit
from tests.support.waiting import eventually

SLEEP = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")
LABELS = {"MILLRACE_REPLICA": "r-1", "MILLRACE_HOME": "/test/process-runtime"}
# A leader whose child stays in the session and ignores SIGTERM.
WITH_WORKER_CODE = """
import subprocess, sys, time
code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", code]).pid, flush=True)
time.sleep(60)
"""
WITH_WORKER = (sys.executable, "-c", WITH_WORKER_CODE)


def test_environment_is_a_small_allow_list() -> None:
    own = {
        "PATH": "/bin",
        "HOME": "/home/x",
        "CUDA_HOME": "/cuda",
        "HTTP_PROXY": "http://proxy",
        "https_proxy": "http://proxy",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "PYTHONPATH": "/elsewhere",
        "MILLRACE_NODEAGENT_NODE": "n",
    }
    made = child_environment(own, {"OMP_NUM_THREADS": "1"}, {"MILLRACE_REPLICA": "r"})
    assert made == {
        "PATH": "/bin",
        "HOME": "/home/x",
        "CUDA_HOME": "/cuda",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "MILLRACE_REPLICA": "r",
    }


async def test_start_and_end(tmp_path: Path) -> None:
    ended = asyncio.Event()
    log = tmp_path / "logs/r-1.log"
    process = await ProcessRuntime().start(
        LaunchCommand((sys.executable, "-c", "print('hello'); raise SystemExit(3)"), {}),
        labels=LABELS,
        log_path=log,
        on_exit=ended.set,
    )
    assert os.getsid(process.identity.pid) == process.identity.pid or process.exited
    await asyncio.wait_for(ended.wait(), 10)
    assert process.exited
    assert process.exit_description == "exit code 3"
    assert log.read_text() == "hello\n"
    process.terminate()
    process.kill()
    process.release()


async def test_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="/no/such/program cannot be used"):
        await ProcessRuntime().start(
            LaunchCommand(("/no/such/program",), {}),
            labels={},
            log_path=tmp_path / "x.log",
            on_exit=lambda: None,
        )


async def test_workers_die_with_their_leader(tmp_path: Path) -> None:
    ended = asyncio.Event()
    log = tmp_path / "x.log"
    process = await ProcessRuntime().start(
        LaunchCommand(WITH_WORKER, {}), labels=LABELS, log_path=log, on_exit=ended.set
    )
    await eventually(lambda: log.exists() and log.read_text().endswith("\n"))
    worker = int(log.read_text())
    os.kill(process.identity.pid, signal.SIGKILL)
    await asyncio.wait_for(ended.wait(), 5)
    assert "SIGKILL" in process.exit_description
    await eventually(lambda: not _runs(worker))


async def test_adoption_checks_start_time_boot_and_labels(tmp_path: Path) -> None:
    ended = asyncio.Event()
    runtime = ProcessRuntime()
    first = await runtime.start(
        LaunchCommand(SLEEP, {}), labels=LABELS, log_path=tmp_path / "x.log", on_exit=lambda: None
    )
    identity = first.identity
    first.release()
    # Just after exec the kernel shows an empty environment for a moment; an agent never adopts that early.
    await eventually(lambda: "up" in (tmp_path / "x.log").read_text())
    try:
        for wrong in (
            ProcessIdentity(identity.pid, identity.start_ticks + 1, identity.boot_id),
            ProcessIdentity(identity.pid, identity.start_ticks, "another boot"),
            ProcessIdentity(2**22 - 1, identity.start_ticks, identity.boot_id),
        ):
            assert await runtime.adopt(wrong, labels=LABELS, on_exit=ended.set) is None
        other = {**LABELS, "MILLRACE_REPLICA": "r-2"}
        assert await runtime.adopt(identity, labels=other, on_exit=ended.set) is None
        adopted = await runtime.adopt(identity, labels=LABELS, on_exit=ended.set)
        assert adopted is not None
        adopted.terminate()
        await asyncio.wait_for(ended.wait(), 5)
        assert adopted.exited
        assert await runtime.adopt(identity, labels=LABELS, on_exit=ended.set) is None
    finally:
        _kill(identity.pid)


async def test_sweep_kills_what_is_left_of_a_session(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    runtime = ProcessRuntime()
    first = await runtime.start(
        LaunchCommand(WITH_WORKER, {}), labels=LABELS, log_path=log, on_exit=lambda: None
    )
    await eventually(lambda: log.read_text().endswith("\n"))
    worker, identity = int(log.read_text()), first.identity
    first.release()
    os.kill(identity.pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, identity.pid, 0)
    assert _runs(worker)
    another_boot = ProcessIdentity(identity.pid, identity.start_ticks, "another boot")
    assert await runtime.sweep(another_boot) == 0
    assert await runtime.sweep(identity) == 1
    await eventually(lambda: not _runs(worker))


async def test_sweep_of_unknown_engines_spares_the_known(tmp_path: Path) -> None:
    runtime = ProcessRuntime()
    labels = {"MILLRACE_HOME": str(tmp_path)}
    known, unknown = [
        await runtime.start(
            LaunchCommand(SLEEP, {}), labels=labels, log_path=tmp_path / name, on_exit=lambda: None
        )
        for name in ("a.log", "b.log")
    ]
    try:
        # Just after exec the kernel shows an empty environment for a moment.
        for name in ("a.log", "b.log"):
            await eventually(lambda name=name: "up" in (tmp_path / name).read_text())
        assert await runtime.sweep_unknown(labels, lambda session, _: session == known.identity.pid) == 1
        await eventually(lambda: unknown.exited)
        assert not known.exited
    finally:
        for process in (known, unknown):
            process.kill()
        await eventually(lambda: known.exited and unknown.exited)


def test_exit_descriptions() -> None:
    assert describe_exit(os.CLD_EXITED, 2) == "exit code 2"
    assert describe_exit(os.CLD_KILLED, signal.SIGSEGV) == "killed by signal SIGSEGV"
    assert "out of memory" in describe_exit(os.CLD_KILLED, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(pid: int) -> None:
    subprocess.run(["kill", "-9", str(pid)], check=False, stderr=subprocess.DEVNULL)


async def test_what_an_owned_engine_started_in_a_session_of_its_own_is_spared(tmp_path: Path) -> None:
    """As Ray's daemons are: their session is not the engine's, their label is."""
    runtime = ProcessRuntime()
    labels = {"MILLRACE_HOME": str(tmp_path)}
    log = tmp_path / "a.log"
    code = "import os, time; print(os.fork() or (os.setsid(), 'up')[1], flush=True); time.sleep(60)"
    engine = await runtime.start(
        LaunchCommand((sys.executable, "-c", code), {}),
        labels={**labels, "MILLRACE_INCARNATION": "one"},
        log_path=log,
        on_exit=lambda: None,
    )
    await eventually(lambda: "up" in log.read_text() and len(log.read_text().splitlines()) == 2)
    helper = next(int(line) for line in log.read_text().splitlines() if line.isdigit())
    try:
        assert await runtime.sweep_unknown(labels, lambda _, incarnation: incarnation == "one") == 0
        assert _runs(helper)
        assert await runtime.sweep_unknown(labels, lambda session, _: session == engine.identity.pid) == 1
        await eventually(lambda: not _runs(helper))
        assert not engine.exited
    finally:
        engine.kill()
        await eventually(lambda: engine.exited)
