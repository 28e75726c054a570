"""`millrace-autoscale replay`: policies and series as files, tables, JSON, pictures and refusals."""

import json
from pathlib import Path

import pytest

from controlplane import autoscale_command
from deploy.autoscale import plots

POLICY = '{"min_replicas": 0, "max_replicas": 3}'
SERIES = "time,requests_per_second\n0,0\n1200,1\n1500,0\n3600,0\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    policy, series = tmp_path / "policy.json", tmp_path / "series.csv"
    policy.write_text(POLICY)
    series.write_text(SERIES)
    return policy, series


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    autoscale_command.main(["replay", *map(str, arguments)])
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        autoscale_command.main(["replay", *map(str, arguments)])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_steps_and_why(capsys: pytest.CaptureFixture[str], files: tuple[Path, Path]) -> None:
    text = run(capsys, *files, "--time-zone", "Europe/Berlin")
    assert "Mon 2030-01-07 01:05" in text
    assert "ScaledToZero: 1 -> 0: no request for 300 s (at least 300 s)" in text
    assert "WokenUp: 0 -> 1" in text
    assert "steps          " in text
    assert "requests       300, " in text


def test_json_holds_every_moment(capsys: pytest.CaptureFixture[str], files: tuple[Path, Path]) -> None:
    document = json.loads(run(capsys, *files, "-o", "json", "--tick-seconds", "10"))
    assert len(document["moments"]) == 360
    assert document["summary"]["requests"] == 300
    assert document["moments"][0]["time"] == "2030-01-07T00:00:00+00:00"


def test_a_recorded_series_holds_its_load(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    policy, series = tmp_path / "policy.json", tmp_path / "recorded.jsonl"
    policy.write_text('{"max_replicas": 8}')
    rows = [
        {"time": "2030-01-07T08:00:00+01:00", "replicas": 2, "utilization": 0.5, "waiting": 0},
        {"time": "2030-01-07T08:01:00+01:00", "replicas": 2, "utilization": 1.0, "waiting": 60},
        {"time": "2030-01-07T08:02:00+01:00", "replicas": 2, "utilization": 1.0},
    ]
    series.write_text("\n".join(map(json.dumps, rows)) + "\n")
    document = json.loads(run(capsys, policy, series, "-o", "json"))
    rates = sorted({each["requests_per_second"] for each in document["moments"]})
    # Half of two replicas of two requests a second; all of them and a queue that grows by one a second.
    assert rates == [2.0, 5.0]
    assert document["moments"][0]["time"] == "2030-01-07T07:00:00+00:00"


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ('{"max_replicas": 0}', "max_replicas: 0 is too small"),
        ('{"max_replicas": 2, "min_replicas": 3}', "autoscale.min_replicas: 3 is not between"),
        (
            '{"max_replicas": 2, "cooldown": 3}',
            "cooldown: is not known; did you mean `cooldown_in_seconds`?",
        ),
        ("{", "malformed JSON"),
    ],
)
def test_wrong_policies_are_named(
    capsys: pytest.CaptureFixture[str], files: tuple[Path, Path], policy: str, problem: str
) -> None:
    files[0].write_text(policy)
    assert problem in refusal(capsys, *files)


@pytest.mark.parametrize(
    ("series", "problem"),
    [
        ("time,requests_per_second\n0,1\n", "needs at least two lines"),
        ("time,requests_per_second\n0,1\n0,2\n", "series.csv:3: is not later than the line before"),
        ("time,requests_per_second\n0,1\nsoon,2\n", "series.csv:3: `soon` is neither RFC 3339 nor seconds"),
        ("time,requests_per_second\n0,1\n9,fast\n", "`requests_per_second` is `fast`, which is no number"),
        ("time,requests_per_second\n0,1\n9,-1\n", "give 0 or more"),
        ("time,load\n0,1\n9,1\n", "has no `replicas`; a line holds `requests_per_second`, or"),
        ("when,requests_per_second\n0,1\n", "has no `time`; its fields are when, requests_per_second"),
        ("time,requests_per_second\n2030-01-07T08:00:00,1\n", "has no zone; add `Z` or an offset"),
    ],
)
def test_wrong_series_are_named_with_their_line(
    capsys: pytest.CaptureFixture[str], files: tuple[Path, Path], series: str, problem: str
) -> None:
    files[1].write_text(series)
    assert problem in refusal(capsys, *files)


def test_files_that_are_not_there(capsys: pytest.CaptureFixture[str], files: tuple[Path, Path]) -> None:
    assert "cannot be read" in refusal(capsys, "none.json", files[1])
    assert "cannot be read" in refusal(capsys, files[0], "none.csv")
    assert "is no IANA time zone" in refusal(capsys, *files, "--time-zone", "Berlin")


def test_a_picture(capsys: pytest.CaptureFixture[str], files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "replay.png"
    run(capsys, *files, "--plot", target, "--tick-seconds", "60")
    assert target.read_bytes().startswith(b"\x89PNG")
    missing = tmp_path / "none" / "replay.png"
    assert "cannot be written" in refusal(capsys, *files, "--plot", missing, "--tick-seconds", "60")


def test_the_policies_of_the_pictures_can_be_kept_to() -> None:
    for name, _, load in plots.PLOTS:
        policy = autoscale_command.read_policy(plots.HERE / f"{name}.json")
        assert policy.max_replicas >= 3
        assert max(map(load, range(plots.MINUTES))) > 2
        assert (plots.HERE / f"{name}.png").stat().st_size < 100_000
