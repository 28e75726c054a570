"""The knowledge base: models, GPUs and engines that Millrace knows without asking anyone.

In come parsed data files, out comes a `KnowledgeBase` that is asked by name. A model is known by its
published configuration, so that a known model and one that is read from its files are sized by the same
formulas. Pure: `controlplane.knowledge` reads the files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from controlplane.sizing.facts import ModelFacts, facts_from_config
from controlplane.sizing.structs import DeviceOption, EngineFacts, GpuModel
from controlplane.sizing.units import MIB
from core.states import DeviceKind, Engine, Quantization

# AWQ and GPTQ are declared for the memory that four bits save; eight-bit files are chosen by their own id.
CHECKPOINT_BITS = 4
_PREFIXES = ("nvidia ", "tesla ", "geforce ")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model of the knowledge base.

    Attributes:
        name: Short name, shared by the variants of one model.
        facts: What its configuration says.
        identifier: Hugging Face id of this variant.
    """

    name: str
    facts: ModelFacts
    identifier: str = ""


@dataclass(frozen=True, slots=True)
class KnowledgeBase:
    """What is known without asking anyone.

    Attributes:
        models: By Hugging Face id and by short name, both in lower case.
        gpus: In the order of the data.
        engines: What an engine needs besides the model.
    """

    models: Mapping[str, KnownModel] = field(default_factory=dict)
    gpus: Sequence[GpuModel] = ()
    engines: Mapping[Engine, EngineFacts] = field(default_factory=dict)

    def model(self, name: str) -> KnownModel | None:
        """Finds a model by Hugging Face id or short name; None where it is not known."""
        return self.models.get(name.lower())

    def checkpoint(self, name: str, quantization: Quantization) -> str | None:
        """Finds the repository that holds a model's files in a quantization that is made beforehand.

        Returns:
            A Hugging Face id of the same model with 4-bit files, None where none is known. A variant such as
            a base model is not taken for the instruction-tuned one: the id has to continue its own.
        """
        declared = self.model(name)
        if declared is None:
            return None
        first = next(each.identifier for each in self.models.values() if each.name == declared.name)
        continued = f"{declared.identifier}-{quantization.name}".lower()
        for each in self.models.values():
            same = each.name == declared.name and each.facts.quantization is quantization
            own = declared.identifier == first or each.identifier.lower().startswith(continued)
            if same and own and each.facts.quantization_bits == CHECKPOINT_BITS:
                return each.identifier
        return None

    def gpu(self, name: str) -> GpuModel | None:
        """Finds a GPU by short name, alias, or the product string of its driver."""
        wanted = _normal(name)
        for gpu in self.gpus:
            if wanted in {_normal(each) for each in (gpu.name, *gpu.aliases, *gpu.products)}:
                return gpu
        return None

    def engine(self, engine: Engine) -> EngineFacts:
        """What an engine needs; the general assumptions where the data say nothing of it."""
        return self.engines.get(engine, EngineFacts())


def device_option(gpu: GpuModel) -> DeviceOption:
    """A whole node of one GPU model, to try a model on."""
    return DeviceOption(
        DeviceKind.NVIDIA, memory_bytes=gpu.memory_bytes, count=gpu.devices_per_node, product=gpu.name
    )


def knowledge_from_data(
    models: Iterable[Mapping[str, object]], gpus: Mapping[str, object], engines: Mapping[str, object]
) -> KnowledgeBase:
    """Builds the knowledge base from parsed data files.

    Raises:
        ValueError: A file lacks something or holds something of the wrong kind; two models share an id.
        InvalidArgument: A model's configuration is not complete.
    """
    known: dict[str, KnownModel] = {}
    for document in models:
        for entry in _items(document, "models"):
            _add_model(known, entry)
    return KnowledgeBase(
        models=known,
        gpus=tuple(_gpu(entry) for entry in _items(gpus, "gpus")),
        engines={
            Engine[name.upper()]: _engine(_mapping(entry))
            for name, entry in _mapping(engines.get("engines")).items()
        },
    )


def _add_model(known: dict[str, KnownModel], entry: Mapping[str, object]) -> None:
    name, base = str(entry["name"]), _mapping(entry.get("config"))
    ways = [(_texts(entry, "ids"), base)]
    ways += [
        (_texts(variant, "ids"), {**base, **_mapping(variant.get("config"))})
        for variant in _items(entry, "variants")
    ]
    for index, (ids, config) in enumerate(ways):
        model = KnownModel(name, facts_from_config(config, weight_file_bytes=None), next(iter(ids), name))
        for each in (*ids, *([name] if index == 0 else [])):
            if each.lower() in known:
                raise ValueError(f"two models of the knowledge base are called {each}")
            known[each.lower()] = model


def _gpu(entry: Mapping[str, object]) -> GpuModel:
    return GpuModel(
        name=str(entry["name"]),
        products=_texts(entry, "products"),
        aliases=_texts(entry, "aliases"),
        memory_bytes=_whole(entry, "memory_mib") * MIB,
        compute_capability=_number(entry, "compute_capability"),
        bfloat16=bool(entry["bfloat16"]),
        native_fp8=bool(entry["native_fp8"]),
        devices_per_node=_whole(entry, "devices_per_node"),
        tier=_whole(entry, "tier"),
        cost_rank=_whole(entry, "cost_rank"),
    )


def _engine(entry: Mapping[str, object]) -> EngineFacts:
    overhead, share = _mapping(entry.get("overhead_bytes")), _mapping(entry.get("memory_utilization"))
    return EngineFacts(
        overhead_bytes={DeviceKind[kind.upper()]: _whole(overhead, kind) for kind in overhead},
        memory_utilization={DeviceKind[kind.upper()]: _number(share, kind) for kind in share},
    )


def _items(document: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    value = document.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"`{name}` of the knowledge base is no list")  # noqa: TRY004 - a file's content is wrong, not a call
    return [_mapping(each) for each in value]


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} of the knowledge base is no object")  # noqa: TRY004 - as above
    return cast("Mapping[str, object]", value)


def _texts(entry: Mapping[str, object], name: str) -> tuple[str, ...]:
    value = entry.get(name, [])
    return tuple(str(each) for each in value) if isinstance(value, list) else ()


def _whole(entry: Mapping[str, object], name: str) -> int:
    return int(_number(entry, name))


def _number(entry: Mapping[str, object], name: str) -> float:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"`{name}` of the knowledge base is {value!r}, no number above 0")
    return value


def _normal(name: str) -> str:
    lowered = name.strip().lower()
    for prefix in _PREFIXES:
        lowered = lowered.removeprefix(prefix)
    return lowered.replace(" ", "-").replace("_", "-")
