"""Options: one line that names the wrong one, exit code 2."""

from pathlib import Path

import pytest

from nodeagent.__main__ import main
from nodeagent.settings import AgentSettings, default_node_name


@pytest.mark.parametrize(
    ("host_name", "node"),
    [("node-1", "node-1"), ("Big.Machine_7", "big-machine-7"), ("...", "node"), ("x" * 80, "x" * 63)],
)
def test_node_name_from_the_host_name(host_name: str, node: str) -> None:
    assert default_node_name(host_name) == node


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--fleet-token-file"),
        (["--fleet-token-file=/none"], "--fleet-token-file: /none cannot be read"),
        (["--fleet-token-file={token}", "--grpc-port=70000"], "--grpc-port"),
        (["--fleet-token-file={token}", "--node=Bad_Name"], "--node"),
        (["--fleet-token-file={token}", "--cpu-memory-fraction=2"], "--cpu-memory-fraction"),
        (
            ["--fleet-token-file={token}", "--engine-port-first=3000", "--engine-port-last=2000"],
            "--engine-port-last",
        ),
        (["--fleet-token-file={token}", "--controlplane-target=nowhere"], "--controlplane-target"),
        (["--fleet-token-file={token}", "--controlplane-target=a:1,nowhere"], "--controlplane-target"),
        (["--fleet-token-file={token}", "--controlplane-target= , "], "at least one control plane"),
        (
            ["--fleet-token-file={token}", "--controlplane-target=" + ",".join(f"a:{n}" for n in range(10))],
            "at most 9",
        ),
        (["--fleet-token-file={token}", "--grpc-host=0.0.0.0"], "--grpc-host"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    token = tmp_path / "token"
    token.write_text("t\n")
    with pytest.raises(SystemExit) as caught:
        main([argument.format(token=token) for argument in arguments])
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


def test_defaults(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t\n")
    settings = AgentSettings(fleet_token_file=token)
    assert settings.node_name
    assert (settings.grpc_port, settings.metrics_port) == (7610, 7611)
    assert not settings.stop_engines_on_exit


def test_control_planes_are_named_once_each(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t\n")
    settings = AgentSettings(
        _cli_parse_args=False, fleet_token_file=token, controlplane_target="one:1, two:2,one:1,"
    )
    assert settings.controlplane_targets == ("one:1", "two:2")
