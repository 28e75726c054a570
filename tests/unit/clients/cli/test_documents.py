import json
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict
from millrace.core.v1 import types_pb2
from millrace_client.cli.documents import Document, parse_documents, read_documents
from millrace_client.errors import InvalidArgument

R1 = """
{ "models": [ { "name": "qwen-72b", "model": "Qwen/Qwen2.5-72B-Instruct", "engine": "vllm",
                "quantization": "awq", "max_model_len": 32768, "replicas": 1, "extra_args": {} } ],
  "namespace": "team-ai",
  "metadata": { "userId": "user-001", "teamId": "team-001", "source": "cli" } }
"""


def parse(text: str, source: str = "x.json") -> list[Document]:
    return parse_documents(text, source=source, folder=Path("/folder"))


def test_the_declaration_of_the_requirements() -> None:
    (document,) = parse(R1)
    assert document.namespace == "team-ai"
    assert document.metadata == {"userId": "user-001", "teamId": "team-001", "source": "cli"}
    message = document.models[0].message()
    assert message.engine == types_pb2.ENGINE_VLLM
    assert message.quantization == types_pb2.QUANTIZATION_AWQ
    assert (message.name, message.max_model_len, message.replicas) == ("qwen-72b", 32768, 1)


def test_what_the_file_does_not_say_stays_unsaid() -> None:
    (document,) = parse('{"models": [{"name": "x", "model": "m"}]}')
    message = document.models[0].message()
    assert (document.namespace, document.metadata) == ("", None)
    assert not message.HasField("replicas")
    assert not message.HasField("max_model_len")
    assert not message.HasField("extra_args")
    assert message.engine == types_pb2.ENGINE_UNSPECIFIED


def test_zero_replicas_are_not_absent() -> None:
    (document,) = parse('{"models": [{"name": "x", "model": "m", "replicas": 0}]}')
    assert document.models[0].message().HasField("replicas")


def test_extra_arguments_keep_their_shape() -> None:
    (document,) = parse(
        '{"models": [{"name": "x", "model": "m", "engine": "external", "extra_args": '
        '{"urls": ["http://a:1"], "deep": {"list": [1, 2.5, true, null]}}}]}'
    )
    assert MessageToDict(document.models[0].message().extra_args) == {
        "urls": ["http://a:1"],
        "deep": {"list": [1, 2.5, True, None]},
    }


def test_yaml_of_the_same_shape_with_several_documents() -> None:
    text = """
namespace: team-ai
models:
  - name: tiny
    model: ./tiny
    engine: vllm-ascend
---
models:
  - {name: other, model: org/other}
"""
    first, second = parse(text, "x.yaml")
    assert first.models[0].model == "/folder/tiny"
    assert first.models[0].message().engine == types_pb2.ENGINE_VLLM_ASCEND
    assert second.models[0].name == "other"


def test_stdin_may_be_either() -> None:
    assert parse(R1, "stdin")[0].models[0].name == "qwen-72b"
    assert parse("models: [{name: x, model: m}]", "stdin")[0].models[0].name == "x"


@pytest.mark.parametrize(
    ("model", "resolved"),
    [
        ("./tiny", "/folder/tiny"),
        ("../tiny", "/tiny"),
        (".", "/folder"),
        ("/models/tiny", "/models/tiny"),
        ("org/tiny", "org/tiny"),
        (".hidden/tiny", ".hidden/tiny"),
    ],
)
def test_relative_paths_are_taken_from_the_file(model: str, resolved: str) -> None:
    (document,) = parse(json.dumps({"models": [{"name": "x", "model": model}]}))
    assert document.models[0].model == resolved


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            '{"name": "x", "model": "m", "engin": "vllm"}',
            r"models\[0\]\.engin: unknown field, did you mean `engine`",
        ),
        (
            '{"name": "x", "model": "m", "engine": "vlm"}',
            r"models\[0\]\.engine: `vlm` is unknown, it is one of vllm, tgi",
        ),
        ('{"name": "x", "model": "m", "engine": 3}', r"models\[0\]\.engine: `3` is unknown"),
        ('{"name": "x", "model": "m", "quantization": "int3"}', r"models\[0\]\.quantization: `int3`"),
        ('{"model": "m"}', r"models\[0\]\.name: is missing"),
        ('{"name": " ", "model": "m"}', r"models\[0\]\.name: has to be a text that is not empty"),
        ('{"name": "x"}', r"models\[0\]\.model: is missing"),
        ('{"name": "x", "model": 3}', r"models\[0\]\.model: has to be a text"),
        ('{"name": "x", "model": "m", "replicas": -1}', r"models\[0\]\.replicas: .* at least 0, not `-1`"),
        ('{"name": "x", "model": "m", "replicas": true}', r"models\[0\]\.replicas"),
        ('{"name": "x", "model": "m", "replicas": "2"}', r"models\[0\]\.replicas"),
        ('{"name": "x", "model": "m", "max_model_len": 0}', r"models\[0\]\.max_model_len: .* at least 1"),
        ('{"name": "x", "model": "m", "max_model_len": 1e99}', r"models\[0\]\.max_model_len"),
        ('{"name": "x", "model": "m", "max_model_len": 99999999999}', r"models\[0\]\.max_model_len"),
        ('{"name": "x", "model": "m", "extra_args": []}', r"models\[0\]\.extra_args: has to be an object"),
        (
            '{"name": "x", "model": "m", "extra_args": {"a": NaN}}',
            r"models\[0\]\.extra_args\.a: `nan` is no JSON",
        ),
        ('"x"', r"models\[0\]: has to be an object"),
    ],
)
def test_wrong_fields_are_named(model: str, expected: str) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        parse(f'{{"models": [{model}]}}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "a declaration is an object"),
        ("{}", "models: needs at least one entry"),
        ('{"models": []}', "models: needs at least one entry"),
        ('{"models": {}}', "models: needs at least one entry"),
        (
            '{"name": "x", "model": "m"}',
            r"models: is missing: write .* around the entry",
        ),
        ('{"models": [{"name": "x", "model": "m"}], "namespace": 1}', "namespace: has to be a text"),
        ('{"models": [{"name": "x", "model": "m"}], "metadata": "x"}', "metadata: has to be an object"),
        (
            '{"models": [{"name": "x", "model": "m"}, {"name": "x", "model": "n"}]}',
            r"models\[1\]\.name: `x` is also the name of models\[0\]",
        ),
        ('{"models": [{"name": "x", "name": "y"}]}', "the field `name` stands twice"),
        ('{"models": [\n  {"name": "x",}\n]}', r"x\.json:2:1[0-9]: not valid JSON"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_wrong_documents_say_where(text: str, expected: str) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models:\n  - name: x\n model: m\n", r"x\.yaml:3:\d+: not valid YAML"),
        (
            "models: [{name: x, model: m, extra_args: {since: 2024-01-01}}]",
            "since: `2024-01-01` is no JSON value",
        ),
        ("models: [{name: x, model: m, extra_args: {1: a}}]", "a field name has to be a text"),
        ("models: [{name: x, model: m, extra_args: {since: 2024-99-99}}]", "not valid YAML"),
        ("", "is empty"),
        ("models: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_wrong_yaml_says_where(text: str, expected: str) -> None:
    with pytest.raises(InvalidArgument, match=expected):
        parse(text, "x.yaml")


def test_aliases_cannot_unfold_without_bound() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9)]
    text = "models: [{name: x, model: m}]\nmetadata:\n" + "\n".join(f"  {line}" for line in lines)
    with pytest.raises(InvalidArgument, match="holds more than"):
        parse(text, "x.yaml")


def test_every_violation_is_reported_at_once_and_the_list_is_bounded() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse('{"models": [{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6}]}')
    assert len(caught.value.violations) == 8
    assert caught.value.message.endswith("and 3 more")


def test_files_are_read_and_compared(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(R1)
    (tmp_path / "b.json").write_text(R1)
    assert len(read_documents([str(tmp_path / "a.json")])) == 1
    with pytest.raises(InvalidArgument, match="also declared in"):
        read_documents([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    with pytest.raises(InvalidArgument, match=r"cannot read .*none: No such file"):
        read_documents([str(tmp_path / "none")])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgument, match="is not UTF-8"):
        read_documents([str(tmp_path / "binary.json")])
    (tmp_path / "large.json").write_bytes(b" " * (1024 * 1024 + 1))
    with pytest.raises(InvalidArgument, match="larger than"):
        read_documents([str(tmp_path / "large.json")])
