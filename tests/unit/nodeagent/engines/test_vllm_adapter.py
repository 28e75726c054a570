"""Command lines of vLLM for CPU and NVIDIA, and what a start needs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from millrace.core.v1 import node_pb2, replica_pb2, types_pb2

from nodeagent.engines.base import CannotStart, ClaimedDevice
from nodeagent.engines.vllm import VllmAdapter

CPU = node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=16 * 2**30)
GPUS = [
    node_pb2.Device(id=f"GPU-{n}", kind=types_pb2.DEVICE_KIND_NVIDIA, memory_bytes=80 * 2**30)
    for n in range(2)
]


def adapter(folder: Path, *, builds: tuple[str, ...] = ("vllm-cpu", "vllm-cuda")) -> VllmAdapter:
    for build in builds:
        (folder / build / "bin").mkdir(parents=True)
        (folder / build / "bin/python").touch()
        (folder / build / "INSTALLED").write_text("0.32.0\n")
    kinds = frozenset({int(types_pb2.DEVICE_KIND_CPU), int(types_pb2.DEVICE_KIND_NVIDIA)})
    return VllmAdapter(folder, kinds, cpu_threads=3)


def launch(**changes: Any) -> replica_pb2.LaunchSpec:
    spec = replica_pb2.LaunchSpec(
        engine=types_pb2.ENGINE_VLLM,
        model="org/model",
        served_model_name="chat",
        max_model_len=4096,
        tensor_parallel=1,
        kv_cache_bytes=2**28,
    )
    for name, value in changes.items():
        if name == "extra_args":
            extra = Struct()
            extra.update(value)
            spec.extra_args.CopyFrom(extra)
        else:
            setattr(spec, name, value)
    return spec


def options(argv: tuple[str, ...]) -> dict[str, str]:
    """Flags with their values; bare flags have none."""
    found: dict[str, str] = {}
    last = ""
    for word in argv[3:]:
        if word.startswith("--"):
            found[word] = ""
            last = word
        else:
            found[last] = word
    return found


def test_cpu_command(tmp_path: Path) -> None:
    command = adapter(tmp_path).command(
        launch(), host="127.0.0.1", port=21000, devices=[ClaimedDevice(CPU, 2**31)]
    )
    assert command.argv[:3] == (
        str(tmp_path / "vllm-cpu/bin/python"),
        "-m",
        "vllm.entrypoints.openai.api_server",
    )
    assert options(command.argv) == {
        "--model": "org/model",
        "--served-model-name": "chat",
        "--host": "127.0.0.1",
        "--port": "21000",
        "--enable-prompt-tokens-details": "",
        "--enable-request-id-headers": "",
        "--shutdown-timeout": "20",
        "--max-model-len": "4096",
        "--enforce-eager": "",
        "--dtype": "bfloat16",
        "--kv-cache-memory-bytes": str(2**28),
    }
    assert command.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert command.environment["OMP_NUM_THREADS"] == "3"
    assert "HF_HUB_OFFLINE" not in command.environment
    assert "PYTHONPATH" not in command.environment


def test_cpu_without_a_cache_size_takes_its_share_of_the_memory(tmp_path: Path) -> None:
    command = adapter(tmp_path).command(
        launch(kv_cache_bytes=0), host="127.0.0.1", port=1, devices=[ClaimedDevice(CPU, 4 * 2**30)]
    )
    assert options(command.argv)["--gpu-memory-utilization"] == "0.25"


def test_gpu_command(tmp_path: Path) -> None:
    command = adapter(tmp_path).command(
        launch(tensor_parallel=2, quantization=types_pb2.QUANTIZATION_AWQ),
        host="10.0.0.1",
        port=21000,
        devices=[ClaimedDevice(gpu, 72 * 2**30) for gpu in GPUS],
    )
    found = options(command.argv)
    assert command.argv[0] == str(tmp_path / "vllm-cuda/bin/python")
    assert found["--tensor-parallel-size"] == "2"
    assert found["--quantization"] == "awq"
    assert found["--gpu-memory-utilization"] == "0.9"
    assert found["--host"] == "10.0.0.1"
    assert "--enforce-eager" not in found
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"


def test_local_model_is_offline_and_shim_is_used(tmp_path: Path) -> None:
    made = adapter(tmp_path)
    (tmp_path / "vllm-cpu/shim").mkdir()
    command = made.command(
        launch(model="/models/x"), host="127.0.0.1", port=1, devices=[ClaimedDevice(CPU, 2**31)]
    )
    assert command.environment["HF_HUB_OFFLINE"] == "1"
    assert command.environment["TRANSFORMERS_OFFLINE"] == "1"
    assert command.environment["PYTHONPATH"] == str(tmp_path / "vllm-cpu/shim")


def test_extra_arguments_win(tmp_path: Path) -> None:
    extra = {"dtype": "float32", "enforce_eager": None, "max_num_seqs": 4}
    command = adapter(tmp_path).command(
        launch(extra_args=extra), host="127.0.0.1", port=1, devices=[ClaimedDevice(CPU, 2**31)]
    )
    found = options(command.argv)
    assert found["--dtype"] == "float32"
    assert found["--max-num-seqs"] == "4"
    assert "--enforce-eager" not in found


def kv_events(made: VllmAdapter, port: int = 21000, **extra: Any) -> Any:
    command = made.command(
        launch(extra_args=extra), host="127.0.0.1", port=port, devices=[ClaimedDevice(CPU, 2**31)]
    )
    value = options(command.argv).get("--kv-events-config")
    assert "--kv-events" not in options(command.argv)
    return json.loads(value) if value is not None else None


def test_kv_events_are_asked_for_and_travel_over_sockets_of_their_own(tmp_path: Path) -> None:
    sockets = tmp_path / "sockets"
    made = dataclasses.replace(adapter(tmp_path), socket_directory=sockets)
    assert kv_events(made) is None
    assert kv_events(made, kv_events=False) is None
    assert not sockets.exists()
    assert kv_events(made, kv_events=True) == {
        "enable_kv_cache_events": True,
        "endpoint": f"ipc://{sockets}/21000.kv",
        "replay_endpoint": f"ipc://{sockets}/21000.replay",
    }
    assert sockets.stat().st_mode & 0o777 == 0o700
    assert kv_events(made, kv_events=True, data_parallel_size=2)["endpoint"] == "tcp://*:0"
    own = {"enable_kv_cache_events": True, "endpoint": "tcp://*:5557"}
    assert kv_events(made, kv_events=True, kv_events_config=own) == own


def test_kv_events_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    made = adapter(tmp_path)
    with pytest.raises(CannotStart, match="true or false"):
        kv_events(made, kv_events="yes")
    deep = dataclasses.replace(made, socket_directory=tmp_path / ("x" * 100))
    with pytest.raises(CannotStart, match="--data-directory"):
        kv_events(deep, kv_events=True)


def test_environments_say_what_is_missing(tmp_path: Path) -> None:
    cpu, cuda = adapter(tmp_path, builds=("vllm-cpu",)).environments()
    assert (cpu.version, cpu.unavailable_reason) == ("0.32.0", "")
    assert list(cuda.device_kinds) == [types_pb2.DEVICE_KIND_NVIDIA]
    assert "not installed" in cuda.unavailable_reason


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    made = adapter(tmp_path, builds=("vllm-cpu",))
    cpu = [ClaimedDevice(CPU, 2**31)]
    made.check(launch(), cpu)
    with pytest.raises(CannotStart, match="does not exist on this node"):
        made.check(launch(model=str(tmp_path / "none")), cpu)
    with pytest.raises(CannotStart, match="not a model directory"):
        made.check(launch(model=str(tmp_path)), cpu)
    with pytest.raises(CannotStart, match="not installed"):
        made.check(launch(), [ClaimedDevice(GPUS[0], 2**31)])
    with pytest.raises(CannotStart, match="one kind"):
        made.check(launch(), [])
    (tmp_path / "vllm-cpu/INSTALLED").unlink()
    with pytest.raises(CannotStart, match="not complete"):
        made.check(launch(), cpu)
