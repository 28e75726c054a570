import json
from pathlib import Path
from typing import Any

import pytest
from millrace_client import Context, resolve_context
from millrace_client.errors import ContextError

LOCAL: dict[str, Any] = {
    "router_url": "http://127.0.0.1:8080",
    "grpc_target": "127.0.0.1:7600",
    "namespace": "local",
    "deployment": "tiny",
    "api_key": "sk-local",
    "admin_token": "local-token",
    "pids": {"router": 1},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / ".millrace").mkdir()
    (tmp_path / ".millrace" / "local.json").write_text(json.dumps(LOCAL))
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    return inner


def resolve(folder: Path, environment: dict[str, str] | None = None, **options: Any) -> Context:
    return resolve_context(folder=folder, environment=environment or {}, **options)


def test_local_file_of_a_parent_answers_everything(folder: Path) -> None:
    context = resolve(folder)
    assert (context.target, context.token, context.namespace) == ("127.0.0.1:7600", "local-token", "local")
    assert (context.router_url, context.api_key, context.deployment) == (
        "http://127.0.0.1:8080",
        "sk-local",
        "tiny",
    )
    assert context.local_file == folder.parent.parent / ".millrace" / "local.json"


def test_environment_goes_before_the_local_file_and_options_before_both(folder: Path, tmp_path: Path) -> None:
    environment = {
        "MILLRACE_SERVER": "10.0.0.1:7600",
        "MILLRACE_TOKEN": "environment-token",
        "MILLRACE_ROUTER_URL": "http://10.0.0.1:8080/v1/",
        "MILLRACE_API_KEY": "sk-environment",
        "MILLRACE_NAMESPACE": "environment",
    }
    context = resolve(folder, environment)
    assert (context.target, context.token, context.namespace) == (
        "10.0.0.1:7600",
        "environment-token",
        "environment",
    )
    assert (context.router_url, context.api_key) == ("http://10.0.0.1:8080", "sk-environment")
    token_file = tmp_path / "token"
    token_file.write_text("option-token\n")
    context = resolve(folder, environment, server="10.0.0.2:7600", token_file=token_file, namespace="option")
    assert (context.target, context.token, context.namespace) == ("10.0.0.2:7600", "option-token", "option")


def test_local_secrets_never_travel_to_another_server(folder: Path) -> None:
    context = resolve(folder, server="10.0.0.1:7600", router_url="http://10.0.0.1:8080")
    assert (context.token, context.api_key, context.deployment) == ("", "", "")
    assert resolve(folder, server="127.0.0.1:7600").token == "local-token"


def test_secrets_are_not_in_the_representation(folder: Path) -> None:
    text = repr(resolve(folder))
    assert "local-token" not in text
    assert "sk-local" not in text


def test_https_means_tls(folder: Path) -> None:
    context = resolve(folder, server="https://millrace.example:7600")
    assert (context.target, context.tls) == ("millrace.example:7600", True)
    assert not resolve(folder).tls


def test_nothing_known_says_the_remedy(tmp_path: Path) -> None:
    context = resolve(tmp_path)
    with pytest.raises(ContextError, match=r"--server .* MILLRACE_SERVER"):
        context.require_target()
    with pytest.raises(ContextError, match=r"--router-url .* MILLRACE_ROUTER_URL"):
        context.require_router_url()
    with pytest.raises(ContextError, match=r"--api-key-file .* MILLRACE_API_KEY"):
        context.require_api_key()
    with pytest.raises(ContextError, match=r"-n NAMESPACE"):
        context.require_namespace()


@pytest.mark.parametrize("server", ["host", "host:", ":7600", "host:port", "host:99999", "http://host/x:1"])
def test_addresses_that_make_no_sense(tmp_path: Path, server: str) -> None:
    with pytest.raises(ContextError, match="host:port"):
        resolve(tmp_path, server=server)


def test_router_url_needs_a_scheme(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="http://host:port"):
        resolve(tmp_path, router_url="127.0.0.1:8080")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"two words", "no header can carry"),
        (b"\xff\xfe", "is not text"),
        (b"x" * 70_000, "larger than"),
    ],
)
def test_token_files_that_hold_no_token(tmp_path: Path, content: bytes, message: str) -> None:
    token_file = tmp_path / "token"
    token_file.write_bytes(content)
    with pytest.raises(ContextError, match=message) as caught:
        resolve(tmp_path, token_file=token_file)
    assert "two words" not in str(caught.value)


def test_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match=r"--token-file .*/none: No such file"):
        resolve(tmp_path, token_file=tmp_path / "none")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_local_file_says_the_remedy(folder: Path, content: str) -> None:
    (folder.parent.parent / ".millrace" / "local.json").write_text(content)
    with pytest.raises(ContextError, match="make up"):
        resolve(folder)
