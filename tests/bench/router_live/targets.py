"""What is measured: Millrace's router, its peers, nginx as the limit, and the engine with nothing before it.

In: the URLs of the engines and the cores. Out: a running target with its port, its key and its process.
Peers come from PyPI into environments of their own under `.millrace/bench/peers`, when first asked for; they
run with their logs off and the cache-aware policy that they recommend. Millrace's router runs as a user
would run it: every check, its log of requests and its metrics on.
Must not: fail a whole run because of one target; what cannot start raises `Unavailable` and becomes a row.
"""

import getpass
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from millrace.core.v1 import policy_pb2

from deploy.native import __main__ as native
from tests.bench.router_live.control_plane import ControlPlane, control_plane
from tests.bench.router_live.native import BENCH_DIRECTORY, REPOSITORY, Unavailable
from tests.bench.router_live.processes import Cores, Pinned, pinned, wait_answering
from tests.support.ports import free_ports
from tests.support.router_cluster import DEPLOYMENT

SGLANG_ROUTER = "sglang-router==0.3.2"
VLLM_ROUTER = "vllm-router==0.1.17"
_INSTALL_SECONDS_MAX = 900


@dataclass(frozen=True)
class Site:
    """Where targets run: a folder for their files, their cores, the model's name at the engines."""

    directory: Path
    cores: Cores
    model: str = DEPLOYMENT


@dataclass(frozen=True)
class Target:
    """A running target.

    Attributes:
        port: Where it serves.
        key: What clients send as bearer.
        process: None where there is nothing before the engine.
        plane: Of Millrace's router only.
    """

    name: str
    port: int
    key: str = "none"
    process: Pinned | None = None
    plane: ControlPlane | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        return self.process.cpu_seconds() if self.process is not None else 0.0


Opener = Callable[[Site, Sequence[str]], AbstractAsyncContextManager[Target]]


def _install(requirement: str) -> Path:
    """Returns the environment of a peer, installing it where it is not there.

    Raises:
        Unavailable: The installation failed; with its last lines.
    """
    environment = BENCH_DIRECTORY / "peers" / requirement.replace("==", "-")
    marker = environment / "INSTALLED"
    if marker.exists():
        return environment
    python = environment / "bin" / "python"
    own_uv = REPOSITORY / ".millrace" / "tools" / "uv" / "bin" / "uv"
    uv = str(own_uv) if own_uv.exists() else shutil.which("uv")
    commands = (
        [
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)],
            [uv, "pip", "install", "--quiet", "--python", str(python), requirement],
        ]
        if uv
        else [
            [sys.executable, "-m", "venv", "--clear", str(environment)],
            [str(python), "-m", "pip", "install", "--quiet", requirement],
        ]
    )
    print(f"installing {requirement} into {environment}", file=sys.stderr, flush=True)
    for command in commands:
        outcome = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_SECONDS_MAX, check=False
        )
        if outcome.returncode != 0:
            last = " / ".join(outcome.stderr.strip().splitlines()[-3:])
            raise Unavailable(f"{requirement} cannot be installed: {last}")
    marker.touch()
    return environment


async def _check_serves(target: Target, model: str) -> Target:
    """Sends one request, so that a target that only looks alive is a row that says so."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    headers = {"authorization": f"Bearer {target.key}"}
    timeout = aiohttp.ClientTimeout(total=30)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout, trust_env=False) as session,
            session.post(f"{target.url}/v1/chat/completions", json=body) as answer,
        ):
            text = await answer.text()
            if answer.status != 200 or '"choices"' not in text:
                raise Unavailable(f"answers {answer.status}: {text[:200]}")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Unavailable(f"does not answer: {error!r}") from error
    return target


@asynccontextmanager
async def direct(site: Site, engine_urls: Sequence[str]) -> AsyncIterator[Target]:
    """The first engine itself."""
    yield Target("engine alone", int(engine_urls[0].rsplit(":", 1)[1]))


@asynccontextmanager
async def nginx(site: Site, engine_urls: Sequence[str]) -> AsyncIterator[Target]:
    """nginx: one worker, round robin, kept connections, no log. What a proxy can do that looks at nothing."""
    binary = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if binary is None:
        raise Unavailable("nginx is not installed (apt install nginx-light)")
    (port,) = free_ports(1)
    folder = site.directory / "nginx"
    folder.mkdir(parents=True, exist_ok=True)
    servers = "".join(f"server {url.removeprefix('http://')};" for url in engine_urls)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off; worker_processes 1; user {getpass.getuser()}; pid {folder}/pid;\n"
        f"error_log {folder}/error; worker_rlimit_nofile 16384; events {{ worker_connections 8192; }}\n"
        f"http {{ access_log off; {temporary} keepalive_requests 1000000000;\n"
        f"upstream engines {{ {servers} keepalive 1024; keepalive_requests 1000000000; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://engines;\n"
        'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;\n'
        "proxy_read_timeout 600s; } } }\n"
    )
    command = [binary, "-c", str(configuration), "-e", str(folder / "error")]
    async with pinned(command, cores=site.cores.router, log=folder / "log") as process:
        target = Target("nginx", port, process=process)
        await wait_answering(process, f"{target.url}/health")
        yield await _check_serves(target, site.model)


@asynccontextmanager
async def sglang_router(
    site: Site, engine_urls: Sequence[str], *, policy: str = "cache_aware"
) -> AsyncIterator[Target]:
    """sglang-router, logs off, no limit on requests at once."""
    environment = _install(SGLANG_ROUTER)
    port, metrics_port = free_ports(2)
    command = [
        str(environment / "bin" / "sglang-router"), "launch",
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port),
        "--worker-urls", *engine_urls, "--policy", policy, "--log-level", "error",
        "--max-concurrent-requests", "-1", "--worker-startup-check-interval", "1",
        "--worker-startup-timeout-secs", "60",
    ]  # fmt: skip
    name = "sglang-router" if policy == "cache_aware" else f"sglang-router {policy}"
    log = site.directory / f"sglang-{port}.log"
    async with pinned(command, cores=site.cores.router, log=log) as process:
        target = Target(name, port, process=process)
        await wait_answering(process, f"{target.url}/health", timeout_seconds=60)
        await wait_answering(process, f"{target.url}/readiness", timeout_seconds=60)
        yield await _check_serves(target, site.model)


@asynccontextmanager
async def vllm_router(site: Site, engine_urls: Sequence[str]) -> AsyncIterator[Target]:
    """vllm-router, logs off."""
    environment = _install(VLLM_ROUTER)
    port, metrics_port = free_ports(2)
    command = [
        str(environment / "bin" / "vllm-router"),
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port),
        "--worker-urls", *engine_urls, "--policy", "cache_aware", "--log-level", "error",
        "--max-concurrent-requests", "100000", "--worker-startup-check-interval", "1",
        "--worker-startup-timeout-secs", "60",
    ]  # fmt: skip
    async with pinned(command, cores=site.cores.router, log=site.directory / "vllm-router.log") as process:
        target = Target("vllm-router", port, process=process)
        await wait_answering(process, f"{target.url}/health", timeout_seconds=60)
        yield await _check_serves(target, site.model)


@asynccontextmanager
async def millrace_routers(
    site: Site,
    engine_urls: Sequence[str],
    *,
    count: int = 1,
    strategy: str = "default",
    arguments: Sequence[str] = (),
    program: Sequence[str] = (str(Path(sys.executable).parent / "millrace-router"),),
    environment: Mapping[str, str] | None = None,
    routing: policy_pb2.Routing | None = None,
    name: str = "",
) -> AsyncIterator[list[Target]]:
    """`millrace-router` processes over one etcd, with their own defaults but for the address of etcd."""
    name = name or ("millrace" if strategy == "default" else f"millrace {strategy}")
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(
            control_plane(engine_urls, served_model_name=site.model, routing=routing)
        )
        targets = []
        for port in free_ports(count):
            command = [
                *program, "--port", str(port),
                "--etcd-endpoints", plane.etcd.endpoint, "--strategy", strategy, *arguments,
            ]  # fmt: skip
            log = site.directory / f"millrace-{port}.log"
            process = await stack.enter_async_context(
                pinned(command, cores=site.cores.router, log=log, environment=environment)
            )
            target = Target(name, port, plane.api_key, process, plane)
            await wait_answering(process, f"{target.url}/health")
            targets.append(await _check_serves(target, DEPLOYMENT))
        yield targets


@asynccontextmanager
async def millrace(site: Site, engine_urls: Sequence[str], **options: Any) -> AsyncIterator[Target]:
    """One `millrace-router` process over a real etcd; options as `millrace_routers` takes them."""
    async with millrace_routers(site, engine_urls, **options) as targets:
        yield targets[0]


@asynccontextmanager
async def millrace_compiled(site: Site, engine_urls: Sequence[str], **options: Any) -> AsyncIterator[Target]:
    """One `millrace-router` process on the modules that `make native` has compiled."""
    problem = native.outdated()
    if problem:
        raise Unavailable(f"{problem} (make native)")
    environment = {"PYTHONPATH": str(native.TREE)}
    async with millrace(
        site, engine_urls, name="millrace, compiled", environment=environment, **options
    ) as target:
        yield target


TARGETS: dict[str, Opener] = {
    "direct": direct,
    "nginx": nginx,
    "sglang-router": sglang_router,
    "vllm-router": vllm_router,
    "millrace": millrace,
    "millrace-compiled": millrace_compiled,
    "sglang-round-robin": partial(sglang_router, policy="round_robin"),
    "millrace-round-robin": partial(millrace, strategy="round-robin"),
}


@asynccontextmanager
async def open_targets(
    name: str, site: Site, engine_urls: Sequence[str], count: int
) -> AsyncIterator[list[Target]]:
    """Runs several routers of one kind side by side; Millrace's read the same etcd."""
    if name == "millrace":
        async with millrace_routers(site, engine_urls, count=count) as targets:
            yield targets
        return
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(TARGETS[name](site, engine_urls)) for _ in range(count)]
