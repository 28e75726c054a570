"""Whatever the model: sums add up, nothing is over-placed, and no longer context would have fitted."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.knowledge import load_knowledge
from controlplane.sizing import SizingRequest, Survey, facts_from_config, survey
from controlplane.sizing.fit import fit
from controlplane.sizing.size import checked_demand
from core.states import Engine, Quantization

KNOWLEDGE = load_knowledge()


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3", "gemma2", "mistral", "qwen3_next", "bert"]))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8, 16]))
    layers = 4 * draw(st.integers(1, 40))
    config: dict[str, Any] = {
        "model_type": family,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 4, 8])),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([64, 128, 256])),
        "hidden_size": 128 * draw(st.integers(1, 128)),
        "intermediate_size": 128 * draw(st.integers(1, 400)),
        "vocab_size": draw(st.integers(1_000, 260_000)),
        "max_position_embeddings": draw(st.sampled_from([512, 2048, 8192, 40_960, 131_072, 1_048_576])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if draw(st.booleans()):
        config["sliding_window"] = draw(st.integers(16, 8192))
    if family == "qwen3_next":
        config |= {
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
        }
    return config


def requests() -> st.SearchStrategy[SizingRequest]:
    return st.builds(
        lambda config, quantization: SizingRequest(
            Engine.VLLM, facts_from_config(config, weight_file_bytes=None), quantization=quantization
        ),
        configurations(),
        st.sampled_from([Quantization.NONE, Quantization.FP8, Quantization.AWQ]),
    )


@settings(max_examples=300, deadline=None)
@given(requests())
def test_every_fit_fits_and_holds_the_longest_context(request: SizingRequest) -> None:
    answer = survey(request, KNOWLEDGE.gpus)
    demand = checked_demand(request, [])
    for each in answer.fits:
        found = each.fit
        overhead = found.overhead_bytes * found.tensor_parallel
        assert found.weights_bytes + found.sequence_bytes + overhead <= found.usable_bytes
        assert found.total_bytes <= found.usable_bytes
        assert found.kv_tokens >= found.max_model_len or found.kv_bytes_per_token == 0
        longer = min(found.max_model_len + 1024, demand.facts.max_positions)
        asked = checked_demand(
            SizingRequest(
                Engine.VLLM, request.facts, quantization=request.quantization, max_model_len=longer
            ),
            [],
        )
        again = fit(asked, found.option, found.tensor_parallel)
        assert (again is not None) == (longer == found.max_model_len)
    check_terms(answer)


def check_terms(answer: Survey) -> None:
    amounts = {term.name: term.bytes for term in answer.terms}
    addends = amounts["weights"] + amounts["kv_cache"] + amounts["overhead"]
    if answer.recommended is None:
        assert answer.fits == ()
        assert answer.why
        assert amounts["refused"] == addends
    else:
        assert answer.recommended in answer.fits
        assert amounts["total"] == addends
