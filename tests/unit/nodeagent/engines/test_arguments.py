"""Tables for extra arguments."""

from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct

from nodeagent.engines.arguments import merge_arguments, to_argv
from nodeagent.engines.base import CannotStart


def struct(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, ["--dtype", "bfloat16", "--enforce-eager"]),
        ({"max_num_seqs": 4}, ["--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", "4"]),
        ({"max-num-seqs": 4}, ["--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", "4"]),
        ({"dtype": "float16"}, ["--dtype", "float16", "--enforce-eager"]),
        ({"dtype": None}, ["--enforce-eager"]),
        ({"enforce_eager": False}, ["--dtype", "bfloat16", "--no-enforce-eager"]),
        ({"enforce_eager": None}, ["--dtype", "bfloat16"]),
        ({"trust": True}, ["--dtype", "bfloat16", "--enforce-eager", "--trust"]),
        ({"ratio": 0.25}, ["--dtype", "bfloat16", "--enforce-eager", "--ratio", "0.25"]),
        ({"offset": -1}, ["--dtype", "bfloat16", "--enforce-eager", "--offset=-1"]),
        ({"names": ["a", "b"]}, ["--dtype", "bfloat16", "--enforce-eager", "--names", "a", "b"]),
        (
            {"config_json": {"depth": 2, "on": True}},
            ["--dtype", "bfloat16", "--enforce-eager", "--config-json", '{"depth":2,"on":true}'],
        ),
    ],
)
def test_extra_arguments_over_computed_ones(extra: dict[str, Any], expected: list[str]) -> None:
    merged = merge_arguments({"dtype": "bfloat16", "enforce-eager": True}, struct(**extra))
    argv = list(to_argv(merged))
    assert sorted(argv) == sorted(expected)
    assert argv[: len(expected)] == expected or len(extra) == 1


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("port", 1, "extra_args.port"),
        ("api_key", "sk-secret", "extra_args.api_key"),
        ("served-model-name", "x", "extra_args.served-model-name"),
        ("--host", "0.0.0.0", "is no argument name"),
        ("Max", 1, "is no argument name"),
        ("a b", 1, "is no argument name"),
        ("", 1, "is no argument name"),
        ("long", "x" * 20_000, "longer than"),
        ("zero", "a\0b", "zero byte"),
    ],
)
def test_refused_arguments_name_the_key(key: str, value: Any, part: str) -> None:
    with pytest.raises(CannotStart) as caught:
        merge_arguments({}, struct(**{key: value}))
    assert part in caught.value.message
    assert "sk-secret" not in caught.value.message


def test_ignored_names_do_not_reach_the_engine() -> None:
    merged = merge_arguments({}, struct(tensor_parallel_size=2, seed=1), ignored=["tensor-parallel-size"])
    assert to_argv(merged) == ("--seed", "1")


def test_overrides_of_the_sizing_stay_out_of_the_command_line() -> None:
    extra = struct(sizing_weights_bytes=1, sizing_overhead_bytes=2, max_num_seqs=4)
    assert to_argv(merge_arguments({}, extra)) == ("--max-num-seqs", "4")
