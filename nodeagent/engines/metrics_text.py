"""Reads Prometheus text pages of engines into normalised samples.

In: the page and a table of names. Out: an `EngineStats` whose fields are set only where the page has a
number. A vLLM page has about a thousand lines of histogram buckets and is read every second for every
engine, so lines are picked by name before anything is parsed.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millrace.core.v1 import stats_pb2

_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')

Series = list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class MetricNames:
    """Where an engine puts each number: the first name that the page has wins.

    Attributes:
        sums: Field of `EngineStats` to series names; all label sets of a series are added up.
        means: As `sums`, but averaged, for shares.
        cache_info: Series whose labels describe the key/value cache; empty where there is none.
        adapter_info: Series whose labels tell the LoRA adapters and whose value is when; empty as well.
    """

    sums: Mapping[str, Sequence[str]]
    means: Mapping[str, Sequence[str]]
    cache_info: str = ""
    adapter_info: str = ""


# A counter is exposed with `_total` by prometheus_client 0.5 and later and without it by others.
VLLM_NAMES = MetricNames(
    sums={
        "running_requests": ("vllm:num_requests_running",),
        "waiting_requests": ("vllm:num_requests_waiting",),
        "prefix_query_tokens_total": ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_queries"),
        "prefix_hit_tokens_total": ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_hits"),
        "prompt_tokens_total": ("vllm:prompt_tokens_total", "vllm:prompt_tokens"),
        "generation_tokens_total": ("vllm:generation_tokens_total", "vllm:generation_tokens"),
        "succeeded_requests_total": ("vllm:request_success_total", "vllm:request_success"),
        "preemptions_total": ("vllm:num_preemptions_total", "vllm:num_preemptions"),
    },
    means={"kv_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")},
    cache_info="vllm:cache_config_info",
    adapter_info="vllm:lora_requests_info",
)


def read_series(text: str, names: frozenset[str]) -> dict[str, Series]:
    """Returns the wanted series: name to (label text, value); values that are not finite are left out."""
    found: dict[str, Series] = {}
    for line in text.splitlines():
        if not line or line[0] == "#":
            continue
        brace = line.find("{")
        name = line[:brace] if brace >= 0 else line.split(" ", 1)[0]
        if name not in names:
            continue
        labels, _, rest = line[brace + 1 :].rpartition("}") if brace >= 0 else ("", "", line[len(name) :])
        words = rest.split()
        if not words:
            continue
        try:
            value = float(words[0])
        except ValueError:
            # One malformed line makes one number unknown, not the whole page.
            continue
        if math.isfinite(value):
            found.setdefault(name, []).append((labels, value))
    return found


def parse_labels(text: str) -> dict[str, str]:
    """Reads the text between the braces of a series."""
    return {
        name: value.replace(r"\"", '"').replace(r"\n", "\n").replace("\\\\", "\\")
        for name, value in _LABEL.findall(text)
    }


def parse_stats(text: str, names: MetricNames) -> stats_pb2.EngineStats:
    """Reads a metrics page into a sample without identity or time."""
    wanted = {each for group in (names.sums, names.means) for aliases in group.values() for each in aliases}
    series = read_series(text, frozenset(wanted | {names.cache_info, names.adapter_info}))
    stats = stats_pb2.EngineStats()
    for field, aliases in names.sums.items():
        values = _first_present(series, aliases)
        if values is not None:
            setattr(stats, field, round(sum(values)))
    for field, aliases in names.means.items():
        values = _first_present(series, aliases)
        if values is not None:
            setattr(stats, field, min(1.0, max(0.0, sum(values) / len(values))))
    _read_cache_info(stats, series.get(names.cache_info, []))
    _read_adapters(stats, series.get(names.adapter_info, []))
    return stats


def _first_present(series: Mapping[str, Series], aliases: Sequence[str]) -> list[float] | None:
    for alias in aliases:
        if alias in series:
            return [value for _, value in series[alias]]
    return None


def _read_cache_info(stats: stats_pb2.EngineStats, info: Series) -> None:
    tokens = 0
    for labels_text, _ in info:
        labels = parse_labels(labels_text)
        block, blocks, size = (
            _whole_number(labels.get(name))
            for name in ("block_size", "num_gpu_blocks", "kv_cache_size_tokens")
        )
        if block is not None:
            stats.kv_block_tokens = block
        if size is None and block is not None and blocks is not None:
            size = block * blocks
        tokens += size or 0
    if tokens:
        stats.kv_cache_tokens = tokens


def _read_adapters(stats: stats_pb2.EngineStats, info: Series) -> None:
    if not info:
        return
    # vLLM never withdraws a label set: the one with the latest time is the present one.
    labels_text, _ = max(info, key=lambda each: each[1])
    labels = parse_labels(labels_text)
    stats.adapters.running.extend(_names(labels.get("running_lora_adapters", "")))
    stats.adapters.waiting.extend(_names(labels.get("waiting_lora_adapters", "")))
    stats.adapters.running_max = _whole_number(labels.get("max_lora")) or 0


def _names(text: str) -> list[str]:
    return [name for each in text.split(",") if (name := each.strip())]


def cache_memory_bytes(text: str, names: MetricNames) -> int | None:
    """Returns the size of a cache that was ordered in bytes, a device; None where it was not."""
    series = read_series(text, frozenset({names.cache_info}))
    sizes = [
        size
        for labels, _ in series.get(names.cache_info, [])
        if (size := _whole_number(parse_labels(labels).get("kv_cache_memory_bytes"))) is not None
    ]
    return max(sizes, default=None)


def _whole_number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
