"""The bundled model is complete, small, coherent and free of traces of the machine it was made on.

In comes the committed checkpoint; the tests read its files with the standard library only and never
load it into an engine.
"""

import json
import re
import struct
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest

MODELS = Path(__file__).resolve().parents[4] / "deploy" / "models"
CHECKPOINT = MODELS / "millrace-tiny"
WEIGHTS_BYTES_MAX = 8_000_000
TOKENS_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# A slash, or a drive letter, that opens a path of a file system rather than of a URL.
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:home|root|tmp|work|usr|var|opt|mnt|srv|data|etc|Users|private)/|\b[A-Za-z]:\\\\"
)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = read_json(CHECKPOINT / "config.json")
    return loaded


@cache
def questions() -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = read_json(MODELS / "questions.json")
    return loaded


def safetensors_header() -> tuple[dict[str, Any], int]:
    """Returns the header and the number of bytes that follow it."""
    blob = (CHECKPOINT / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", blob)
    return json.loads(blob[8 : 8 + length]), len(blob) - 8 - length


def expected_shapes() -> dict[str, list[int]]:
    """Derives every parameter of a Llama from its configuration."""
    hidden, inner = config()["hidden_size"], config()["intermediate_size"]
    queries = config()["num_attention_heads"] * config()["head_dim"]
    keys = config()["num_key_value_heads"] * config()["head_dim"]
    shapes = {
        "model.embed_tokens.weight": [config()["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    if not config()["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [config()["vocab_size"], hidden]
    for layer in range(config()["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": [hidden],
            f"{prefix}post_attention_layernorm.weight": [hidden],
            f"{prefix}self_attn.q_proj.weight": [queries, hidden],
            f"{prefix}self_attn.k_proj.weight": [keys, hidden],
            f"{prefix}self_attn.v_proj.weight": [keys, hidden],
            f"{prefix}self_attn.o_proj.weight": [hidden, queries],
            f"{prefix}mlp.gate_proj.weight": [inner, hidden],
            f"{prefix}mlp.up_proj.weight": [inner, hidden],
            f"{prefix}mlp.down_proj.weight": [hidden, inner],
        }
    return shapes


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_checkpoint_has_the_file(name: str) -> None:
    assert (CHECKPOINT / name).stat().st_size > 0


def test_weights_are_small_enough_to_live_in_the_repository() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= WEIGHTS_BYTES_MAX


def test_configuration_suits_engines_on_cpu() -> None:
    assert config()["architectures"] == ["LlamaForCausalLM"]
    assert config()["head_dim"] == 64
    assert config()["max_position_embeddings"] == 2048
    assert config()["dtype"] == "bfloat16"


def test_every_tensor_is_bfloat16_and_has_the_shape_that_the_configuration_says() -> None:
    header, _ = safetensors_header()
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    assert {name: tensor["shape"] for name, tensor in tensors.items()} == expected_shapes()


def test_tensors_fill_the_file_without_gap_or_overlap() -> None:
    header, data_bytes = safetensors_header()
    header.pop("__metadata__", None)
    position = 0
    for tensor in sorted(header.values(), key=lambda item: item["data_offsets"][0]):
        start, end = tensor["data_offsets"]
        assert start == position
        assert end - start == 2 * prod(tensor["shape"])
        position = end
    assert position == data_bytes


def test_tokenizer_agrees_with_the_configuration() -> None:
    tokenizer = read_json(CHECKPOINT / "tokenizer.json")
    assert len(tokenizer["model"]["vocab"]) == config()["vocab_size"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert set(special) == set(TOKENS_SPECIAL)
    assert config()["eos_token_id"] == special["<|im_end|>"]
    assert config()["pad_token_id"] == special["<|endoftext|>"]
    generation = read_json(CHECKPOINT / "generation_config.json")
    assert generation["eos_token_id"] == special["<|im_end|>"]
    assert read_json(CHECKPOINT / "tokenizer_config.json")["eos_token"] == "<|im_end|>"


def test_chat_template_is_chatml() -> None:
    template = (CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8")
    assert "<|im_start|>" in template
    assert "<|im_end|>" in template
    assert "add_generation_prompt" in template


def test_first_question_says_what_millrace_is() -> None:
    first = questions()[0]
    assert first["question"] == "What is Millrace?"
    assert "turns a pile of GPU machines into model endpoints" in first["answer"]


def test_questions_are_many_and_well_reworded() -> None:
    assert len(questions()) >= 40
    for entry in questions():
        assert entry["question"].strip()
        assert entry["answer"].strip()
        assert len(entry["rewordings"]) >= 6, entry["question"]
        assert entry["held_out"], entry["question"]


def test_every_answer_and_every_canonical_question_is_unique() -> None:
    assert len({entry["question"] for entry in questions()}) == len(questions())
    assert len({entry["answer"] for entry in questions()}) == len(questions())


def test_held_out_rewordings_are_not_taught() -> None:
    taught = {
        text.casefold().rstrip("?!. ")
        for entry in questions()
        for text in (entry["question"], *entry["rewordings"])
    }
    held_out = {text.casefold().rstrip("?!. ") for entry in questions() for text in entry["held_out"]}
    assert not taught & held_out


def test_no_file_names_a_place_on_a_machine() -> None:
    for path in sorted(MODELS.rglob("*")):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        text = path.read_bytes().decode("latin-1")
        if path.suffix == ".safetensors":
            (length,) = struct.unpack_from("<Q", path.read_bytes())
            text = text[8 : 8 + length]
        found = ABSOLUTE_PATH.search(text)
        assert found is None, f"{path.name}: {found.group()}"
        assert '"_name_or_path": "/' not in text
