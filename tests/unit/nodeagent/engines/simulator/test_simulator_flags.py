import pytest

from nodeagent.engines.simulator.flags import parse_settings


def test_defaults_are_vllms() -> None:
    settings = parse_settings(["--model", "/m"])
    assert settings.served_model_names == ("/m",)
    assert settings.limits.block_size_tokens == 16
    assert settings.limits.block_count == 4096
    assert settings.limits.max_model_length_tokens == 32_768
    assert settings.shutdown_timeout_seconds == 0


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("32k", 32_000), ("2K", 2048), ("1.5k", 1500)])
def test_model_length_takes_suffixes(text: str, tokens: int) -> None:
    settings = parse_settings(["--model", "m", "--max-model-len", text])
    assert settings.limits.max_model_length_tokens == tokens


def test_model_length_follows_a_small_cache() -> None:
    settings = parse_settings(["--model", "m", "--num-gpu-blocks-override", "11"])
    assert settings.limits.max_model_length_tokens == 160


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-parallel-size", "2"], "unrecognized arguments: --tensor-parallel-size 2"),
        (["--max-num-seq", "2"], "unrecognized arguments"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--port", "70000"], "--port"),
        (["--inter-token-latency-ms", "nan"], "--inter-token-latency-ms"),
        (["--max-model-len", "x"], "--max-model-len"),
        (["--max-model-len", "100", "--num-gpu-blocks-override", "4"], "does not fit"),
        (["--num-gpu-blocks-override", "1"], "does not fit"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_settings(["--model", "m", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
