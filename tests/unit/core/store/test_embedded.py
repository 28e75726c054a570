from pathlib import Path

import pytest

from core.store import embedded, find_etcd_binary


def test_an_etcd_on_the_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "etcd"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_etcd_binary() == binary


def test_the_wheel_serves_machines_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = find_etcd_binary()
    assert found is not None
    assert found.name == "etcd"
    assert found.parent.name == "etcdbin"


def test_neither_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(embedded, "_in_wheel", lambda: None)
    assert find_etcd_binary() is None
