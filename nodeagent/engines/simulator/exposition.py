"""Counters, gauges and histograms with fixed labels, rendered as Prometheus text.

In: family definitions and values. Out: the lines that prometheus_client would write, `_total` and
`_created` included, labels sorted by name.
Must not: know vLLM's names (metrics.py does) or import prometheus_client, whose import alone costs
a fifth of the start-up budget.
"""

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


def number(value: float) -> str:
    """A sample's value or a bucket's bound in text."""
    return "+Inf" if math.isinf(value) else repr(float(value))


def labels_text(labels: Mapping[str, str]) -> str:
    """`{a="x",b="y"}` with escaped values, empty without labels."""
    if not labels:
        return ""
    parts = []
    for name in sorted(labels):
        value = labels[name].replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        parts.append(f'{name}="{value}"')
    return "{" + ",".join(parts) + "}"


@dataclass(frozen=True)
class Section:
    """A name's lines: what it is, and its samples."""

    name: str
    kind: str
    help_text: str
    samples: list[str]


class Family:
    """A counter or gauge: one value for each of its label sets."""

    def __init__(self, name: str, kind: str, help_text: str) -> None:
        self.name = name
        self.kind = kind
        self.help_text = help_text
        self._values: dict[str, float] = {}

    def child(self, labels: Mapping[str, str]) -> "Child":
        """The series with these labels, at 0 from now on."""
        key = labels_text(labels)
        self._values.setdefault(key, 0.0)
        return Child(self._values, key)

    def keep_newest(self, count: int) -> None:
        """Forgets the series that were set up first, beyond this many."""
        while len(self._values) > count:
            del self._values[next(iter(self._values))]

    def sections(self, created_seconds: float) -> Iterator["Section"]:
        """The family in text."""
        is_counter = self.kind == "counter"
        name = f"{self.name}_total" if is_counter else self.name
        samples = [f"{name}{key} {number(value)}" for key, value in self._values.items()]
        yield Section(name, self.kind, self.help_text, samples)
        if is_counter:
            yield _created(self.name, self.help_text, self._values, created_seconds)


class Child:
    """One series of a counter or gauge."""

    __slots__ = ("_key", "_values")

    def __init__(self, values: dict[str, float], key: str) -> None:
        self._values = values
        self._key = key

    def add(self, amount: float = 1.0) -> None:
        """Adds to a counter."""
        self._values[self._key] += amount

    def set(self, value: float) -> None:
        """Sets a gauge, or a counter to a total kept elsewhere."""
        self._values[self._key] = value


class Histogram:
    """A histogram with one label set."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float], labels: Mapping[str, str]) -> None:
        self.name = name
        self.help_text = help_text
        self._bounds = [float(bound) for bound in bounds]
        self._labels = dict(labels)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value into its bucket."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def sections(self, created_seconds: float) -> Iterator["Section"]:
        """The family in text, buckets cumulative."""
        samples = []
        total = 0
        for bound, count in zip([*self._bounds, math.inf], self._counts, strict=True):
            total += count
            key = labels_text({**self._labels, "le": number(bound)})
            samples.append(f"{self.name}_bucket{key} {number(total)}")
        key = labels_text(self._labels)
        samples.append(f"{self.name}_count{key} {number(total)}")
        samples.append(f"{self.name}_sum{key} {number(self._sum)}")
        yield Section(self.name, "histogram", self.help_text, samples)
        yield _created(self.name, self.help_text, [key], created_seconds)


def _created(
    name: str, help_text: str, keys: Sequence[str] | Mapping[str, float], created_seconds: float
) -> Section:
    """The `_created` gauge that prometheus_client adds to counters and histograms."""
    samples = [f"{name}_created{key} {number(created_seconds)}" for key in keys]
    return Section(f"{name}_created", "gauge", help_text, samples)


def render(groups: Sequence[Sequence[Family | Histogram]], created_seconds: float) -> bytes:
    """The text of several groups that hold the same families, each family told once."""
    lines: list[str] = []
    for same in zip(*groups, strict=True):
        for sections in zip(*(family.sections(created_seconds) for family in same), strict=True):
            first = sections[0]
            lines.append(f"# HELP {first.name} {first.help_text}")
            lines.append(f"# TYPE {first.name} {first.kind}")
            for section in sections:
                lines += section.samples
    return ("\n".join(lines) + "\n").encode()


def one_two_five(limit: int) -> list[float]:
    """Bounds 1, 2, 5, 10, 20, 50, ... up to the limit."""
    bounds: list[float] = []
    decade = 1
    while True:
        for factor in (1, 2, 5):
            if factor * decade > limit:
                return bounds
            bounds.append(float(factor * decade))
        decade *= 10
