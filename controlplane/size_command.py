"""`millrace-size`: what a model needs and on which GPUs it fits, without a cluster.

In come a model (Hugging Face id, short name, directory or configuration file) and what is asked of it; out
goes JSON or a table. `millrace size` becomes this program. Nothing is declared or started, and a model of
the knowledge base is sized without any network.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane.api.models import FileModelSource
from controlplane.knowledge import load_knowledge
from controlplane.sizing import (
    GpuFit,
    GpuModel,
    KnowledgeBase,
    ModelFacts,
    SizingRequest,
    Survey,
    format_bytes,
    survey,
)
from core.errors import InvalidArgument, MillraceError
from core.logging import configure
from core.states import Engine, Quantization

_QUANTIZATIONS = ("none", "awq", "gptq", "fp8")


@dataclass(frozen=True, slots=True)
class _Options:
    model: str
    quantization: Quantization
    max_model_len: int | None
    gpus: tuple[GpuModel, ...]
    extra_args: dict[str, object]
    output: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Sizes one model.

    Exit codes: 0 with an answer, also where the answer is that nothing fits; 2 for a wrong option or model.
    """
    # What is logged must not stand between the lines of an answer that a program reads.
    configure(service="size", level="WARNING")
    parser = _parser()
    parsed = parser.parse_args(arguments)
    knowledge = load_knowledge()
    try:
        options = _options(parsed, knowledge)
        facts = asyncio.run(_facts(options.model, knowledge))
        answer = _survey(options, knowledge, facts)
    except MillraceError as error:
        sys.stderr.write(f"error: {error.message}\n")
        raise SystemExit(2) from None
    text = json.dumps(as_json(answer), indent=2) + "\n" if options.output == "json" else as_table(answer)
    sys.stdout.write(text)


def as_json(answer: Survey) -> dict[str, Any]:
    """The answer as programs read it; `why` and `would_fit` are there only where nothing fits."""
    document: dict[str, Any] = {
        "parameters": answer.parameters,
        "weights_bytes": answer.weights_bytes,
        "kv_bytes_per_token": answer.kv_bytes_per_token,
        "fits": [{**_place(each), "kv_tokens": each.fit.kv_tokens} for each in answer.fits],
        "recommended": None if answer.recommended is None else _place(answer.recommended),
        "terms": [
            {"name": term.name, "bytes": term.bytes, "explanation": term.explanation} for term in answer.terms
        ],
    }
    if answer.recommended is None:
        document["why"] = answer.why
        document["would_fit"] = [
            {
                "quantization": each.quantization.name.lower(),
                "weights_bytes": each.weights_bytes,
                **_place(each.found),
                "kv_tokens": each.found.fit.kv_tokens,
            }
            for each in answer.alternatives
        ]
    return document


def as_table(answer: Survey) -> str:
    """The answer as people read it."""
    lines = [
        f"parameters   {answer.parameters:,}",
        f"weights      {format_bytes(answer.weights_bytes)}",
        f"KV a token   {format_bytes(answer.kv_bytes_per_token)}",
    ]
    explained = {term.name: term.explanation for term in answer.terms}
    if answer.recommended is None:
        lines.append(f"\nnothing fits: {answer.why}")
        lines.extend(f"  would fit: {each.text}" for each in answer.alternatives)
        return "\n".join(lines) + "\n"
    lines.append(f"recommended  {answer.recommended.text}")
    lines.append(f"\n{explained['total']}")
    if "refused" in explained:
        lines.append(f"passed over: {explained['refused']}")
    lines.append(f"launch with: {explained['launch']}")
    lines.append(f"\n  {'GPU':<12}{'COUNT':>6}{'TP':>4}{'CONTEXT':>9}{'KV TOKENS':>12}{'AT ONCE':>9}")
    for each in answer.fits:
        mark = "*" if each is answer.recommended else " "
        at_once = f"{each.fit.kv_tokens / each.fit.max_model_len:.1f}" if each.fit.kv_tokens else "-"
        lines.append(
            f"{mark} {each.gpu.name:<12}{each.count:>6}{each.count:>4}{each.fit.max_model_len:>9}"
            f"{each.fit.kv_tokens:>12}{at_once:>9}"
        )
    return "\n".join(lines) + "\n"


def _place(found: GpuFit) -> dict[str, Any]:
    return {
        "gpu": found.gpu.name,
        "count": found.count,
        "tensor_parallel": found.fit.tensor_parallel,
        "max_model_len": found.fit.max_model_len,
    }


async def _facts(model: str, knowledge: KnowledgeBase) -> ModelFacts:
    source = FileModelSource(knowledge)
    path, kind = _local(model)
    if path is None:
        return await source.facts(model)
    if kind == "file":
        return await source.facts_of_file(path)
    return await source.facts(str(path))


def _local(model: str) -> tuple[Path | None, str]:
    """Where a model lies on this machine; a `config.json` stands for its directory and its weights."""
    path = Path(model).expanduser().absolute()
    if path.is_dir():
        return path, "directory"
    if path.is_file():
        return (path.parent, "directory") if path.name == "config.json" else (path, "file")
    return None, ""


def _survey(options: _Options, knowledge: KnowledgeBase, facts: ModelFacts) -> Survey:
    request = SizingRequest(
        engine=Engine.VLLM,
        facts=facts,
        quantization=options.quantization,
        max_model_len=options.max_model_len,
        extra_args=options.extra_args,
        engine_facts=knowledge.engine(Engine.VLLM),
    )
    if options.gpus:
        return survey(request, options.gpus, known=knowledge.gpus)
    return survey(request, knowledge.gpus)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="millrace size", description="What a model needs, and on which GPUs it fits. Needs no cluster."
    )
    parser.add_argument(
        "model", metavar="MODEL_OR_CONFIG", help="Hugging Face id, model directory, or config.json"
    )
    parser.add_argument("--quantization", "-q", choices=_QUANTIZATIONS, default="none")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="context in tokens; else the longest")
    parser.add_argument(
        "--gpus", default="", metavar="NAMES", help="such as A100-80GB,L40S,T4; else all known"
    )
    parser.add_argument(
        "--extra-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="engine argument that overrides a term, such as gpu_memory_utilization=0.9; repeatable",
    )
    parser.add_argument("--output", "-o", choices=("table", "json"), default="table")
    return parser


def _options(parsed: argparse.Namespace, knowledge: KnowledgeBase) -> _Options:
    return _Options(
        model=parsed.model,
        quantization=Quantization[parsed.quantization.upper()],
        max_model_len=parsed.max_model_len,
        gpus=_gpus(parsed.gpus, knowledge),
        extra_args=dict(_argument(each) for each in parsed.extra_arg),
        output=parsed.output,
    )


def _gpus(names: str, knowledge: KnowledgeBase) -> tuple[GpuModel, ...]:
    found: list[GpuModel] = []
    for name in filter(None, (each.strip() for each in names.split(","))):
        gpu = knowledge.gpu(name)
        if gpu is None:
            known = ", ".join(each.name for each in knowledge.gpus)
            raise InvalidArgument.of("--gpus", f"`{name}` is not known; known are {known}")
        if gpu not in found:
            found.append(gpu)
    return tuple(found)


def _argument(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidArgument.of("--extra-arg", f"`{text}` is no NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main()
