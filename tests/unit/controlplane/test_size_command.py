"""`millrace-size`: names, files, output and refusals, with no cluster and no network."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from controlplane import size_command

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
AWQ = ["--quantization", "awq", "--gpus", "A100-80GB,L40S,T4"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    size_command.main([*arguments, "-o", "json"])
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        size_command.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_json_of_a_known_model(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, "Qwen/Qwen2.5-72B-Instruct", *AWQ)
    assert list(document) == [
        "parameters",
        "weights_bytes",
        "kv_bytes_per_token",
        "fits",
        "recommended",
        "terms",
    ]
    assert (document["parameters"], document["kv_bytes_per_token"]) == (72_706_203_648, 327_680)
    assert document["fits"] == [
        {"gpu": "A100-80GB", "count": 1, "tensor_parallel": 1, "max_model_len": 32768, "kv_tokens": 103172}
    ]
    assert document["recommended"] == {
        "gpu": "A100-80GB",
        "count": 1,
        "tensor_parallel": 1,
        "max_model_len": 32768,
    }


def test_a_file_a_directory_and_a_name_say_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "qwen-72b.json").write_text(json.dumps(CONFIG))
    known = answer(capsys, "Qwen2.5-72B", *AWQ)
    for given in (tmp_path, tmp_path / "config.json", tmp_path / "qwen-72b.json"):
        assert answer(capsys, str(given), *AWQ) == known
    monkeypatch.chdir(tmp_path)
    assert answer(capsys, "qwen-72b.json", *AWQ) == known


def test_weight_files_beside_the_configuration_count(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {"total_size": 145_412_407_296}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert answer(capsys, str(tmp_path / "config.json"))["weights_bytes"] == 145_412_407_296


def test_what_does_not_fit_says_why_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, "deepseek-ai/DeepSeek-V3", "--quantization", "fp8", "--gpus", "A100-80GB")
    assert (document["recommended"], document["fits"]) == (None, [])
    assert "does not fit" in document["why"]
    first = document["would_fit"][0]
    assert (first["gpu"], first["count"], first["quantization"]) == ("H200", 8, "fp8")


def test_the_table_marks_the_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    size_command.main(["Qwen2.5-72B", "--max-model-len", "8192", "--gpus", "A100,L40S"])
    shown = capsys.readouterr().out
    assert "fits with tp=2" in shown
    (marked,) = [line for line in shown.splitlines() if line.startswith("*")]
    assert marked.split()[1:4] == ["A100-80GB", "2", "2"]
    size_command.main(["DeepSeek-V3", "--gpus", "T4"])
    assert "would fit: fp8 weights (626.8 GiB) on 8x H200" in capsys.readouterr().out
    size_command.main(["bge-large-zh-v1.5"])
    assert "no KV (an encoder)" in capsys.readouterr().out


def test_an_argument_overrides_a_term(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(
        capsys,
        "Qwen2.5-72B",
        *AWQ,
        "--extra-arg",
        "gpu_memory_utilization=0.9",
        "--extra-arg",
        "max_model_len=16k",
    )
    assert "16000 x 1" in document["terms"][3]["explanation"]
    assert "of 72.0 GiB usable" in document["terms"][3]["explanation"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["Qwen2.5-7B", "--gpus", "Voodoo"], "--gpus: `Voodoo` is not known; known are T4"),
        (["Qwen2.5-7B", "--extra-arg", "nonsense"], "no NAME=VALUE"),
        (["Qwen2.5-7B", "--max-model-len", "0"], "at least 1 token"),
        (["Qwen2.5-7B", "--max-model-len", "99999999"], "more than the model takes"),
        (["millrace-tests/nothing"], "HF_HUB_OFFLINE"),
    ],
)
def test_refusals_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    line = refusal(capsys, *arguments)
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert part in line


def test_a_useless_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text("[]")
    assert "no JSON object" in refusal(capsys, str(tmp_path / "odd.json"))


def test_the_client_becomes_the_program() -> None:
    program = Path(sys.executable).parent / "millrace"
    done = subprocess.run(
        [program, "size", "Qwen2.5-7B", "--quantization", "awq", "-o", "json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["recommended"]["gpu"] == "T4"
