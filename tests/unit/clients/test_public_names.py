import subprocess
import sys

import millrace_client


def test_public_names_are_frozen_and_importable() -> None:
    assert dir(millrace_client) == [
        "BlockingClient",
        "ChangeKind",
        "Context",
        "DeploymentChange",
        "MillraceClient",
        "errors",
        "resolve_context",
    ]
    assert all(getattr(millrace_client, name) for name in millrace_client.__all__)


def test_help_loads_no_heavy_module() -> None:
    program = (
        "import sys; from millrace_client.cli import execute; code = execute(['--help']); "
        "heavy = {'grpc', 'httpx', 'rich', 'yaml', 'google.protobuf'} & set(sys.modules); "
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "millrace apply -f qwen.json" in finished.stdout
