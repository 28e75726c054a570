"""Which environment or image an engine needs on which hardware, and the arguments that the hardware asks for.

In come the rows of `environments.json`, and of an operator's own file before them; out comes the first row
that suits an engine and a device. A row names a family (CUDA 12.4, CANN 8), and perhaps the container image
of it: which build of a family a node has is the agent's knowledge. Decides nothing about where a replica
goes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controlplane.sizing import KnowledgeBase
from core.states import DeviceKind, Engine

FILE_BYTES_MAX = 1024 * 1024
"""An operator's file of a few thousand rows is far below."""

EngineWord = Literal["vllm", "tgi", "sglang", "ollama", "llamacpp", "xllm", "vllm_ascend"]


class Row(BaseModel):
    """One row: what it suits, and what follows. What is absent suits everything."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    engine: EngineWord
    device: Literal["cpu", "nvidia"] | None = None
    products: tuple[str, ...] = ()
    compute_capability_from: float | None = None
    compute_capability_below: float | None = None
    family: Annotated[str, Field(min_length=1, max_length=64)]
    image: Annotated[str, Field(max_length=512, pattern=r"^(\S+[:@]\S+)?$")] = ""
    arguments: Mapping[str, str | int | float | bool] = Field(default_factory=dict)
    source: str = ""

    def arguments_beside(self, said: Iterable[str]) -> dict[str, str | int | float | bool]:
        """The arguments that the hardware asks for, but for those that the user gives, which win."""
        given = {name.replace("-", "_") for name in said}
        return {name: value for name, value in self.arguments.items() if name.replace("-", "_") not in given}

    def words(self, said: Iterable[str]) -> str:
        """What an engine is started from, for a person; `said` as for `arguments_beside`."""
        beside = self.arguments_beside(said)
        arguments = ", ".join(f"{name}={value}" for name, value in sorted(beside.items()))
        image = f" (image {self.image})" if self.image else ""
        return f"environment {self.family}{image}" + (f" with {arguments}" if arguments else "")

    def suits(self, engine: Engine, kind: DeviceKind, product: str, capability: float | None) -> bool:
        """True when the row is for this engine on this device."""
        if self.engine != engine.name.lower() or (self.device and self.device != kind.name.lower()):
            return False
        if self.products and product not in self.products:
            return False
        if self.compute_capability_from is None and self.compute_capability_below is None:
            return True
        # What a GPU can do that nobody knows is not guessed.
        return (
            capability is not None
            and (self.compute_capability_from is None or capability >= self.compute_capability_from)
            and (self.compute_capability_below is None or capability < self.compute_capability_below)
        )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    environments: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Environments:
    """The matrix.

    Attributes:
        rows: The first that suits wins.
        knowledge: Knows GPUs by the product string of their driver.
    """

    rows: Sequence[Row] = ()
    knowledge: KnowledgeBase = field(default_factory=KnowledgeBase)

    def find(self, engine: Engine, kind: DeviceKind, product: str) -> Row | None:
        """Finds the row for an engine on a device; None where there is none."""
        gpu = self.knowledge.gpu(product) if product else None
        capability = gpu.compute_capability if gpu is not None else None
        return next((row for row in self.rows if row.suits(engine, kind, product, capability)), None)


def read_rows(text: str, source: str) -> tuple[Row, ...]:
    """Reads rows from a file's content.

    Raises:
        ValueError: Something in it is wrong; names the file, the field and what is expected.
    """
    try:
        return _File.model_validate_json(text).environments
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{source}: {path}: {first['msg']}") from error


def read_operator_rows(path: Path) -> tuple[Row, ...]:
    """Reads an operator's own rows.

    Raises:
        ValueError: The file cannot be read, is too large or is wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise ValueError(f"{path}: larger than {FILE_BYTES_MAX} bytes; is it the right file?")
        return read_rows(content.decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
