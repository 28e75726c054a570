"""What one replica of a spec needs, and whether any known node could ever hold it.

In comes a checked spec, out comes its `Sizing`; refusals carry the field as the caller wrote it. The
numbers come from `controlplane.sizing` and the knowledge base, the devices from what agents reported.
"""

from collections import Counter
from dataclasses import replace

from millrace.core.v1 import deployment_pb2, node_pb2, sizing_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.api.models import ModelSource
from controlplane.api.view import ClusterView
from controlplane.convert import sizing_to_proto, struct_to_dict
from controlplane.sizing import Calibration, DeviceOption, KnowledgeBase, ModelFacts, SizingRequest, size
from core.errors import FailedPrecondition, FieldViolation, InvalidArgument
from core.states import DeviceKind, Engine, Quantization


class Sizer:
    """Sizes specs against the nodes that are known."""

    def __init__(
        self, view: ClusterView, models: ModelSource, knowledge: KnowledgeBase | None = None
    ) -> None:
        self._view = view
        self._models = models
        self._knowledge = knowledge if knowledge is not None else KnowledgeBase()

    async def size(self, spec: deployment_pb2.DeploymentSpec, prefix: str) -> sizing_pb2.Sizing:
        """Sizes one replica.

        Args:
            spec: Checked, with defaults.
            prefix: Put before field names in errors, such as `models[0].`.

        Raises:
            InvalidArgument: The model cannot be found, or does not go with what was asked for.
            FailedPrecondition: No known node could ever hold it.
        """
        try:
            facts: ModelFacts | None = None
            launch_model = ""
            if spec.engine == types_pb2.ENGINE_VLLM:
                facts = await self._models.facts(spec.model)
                if _made_beforehand(spec, facts):
                    launch_model = self._checkpoint(spec)
                    facts = await self._models.facts(launch_model)
            request = SizingRequest(
                engine=Engine(spec.engine),
                facts=facts,
                quantization=Quantization(spec.quantization),
                max_model_len=spec.max_model_len if spec.HasField("max_model_len") else None,
                extra_args=struct_to_dict(spec.extra_args),
                engine_facts=self._knowledge.engine(Engine(spec.engine)),
                calibrations=self._calibrations(spec, launch_model or spec.model),
            )
            sizing = sizing_to_proto(size(request, self.device_options(spec.engine)))
            sizing.launch_model = launch_model
            return sizing
        except InvalidArgument as error:
            metadata = {**error.metadata, "field": prefix + error.metadata.get("field", "")}
            raise InvalidArgument(
                [FieldViolation(prefix + each.field, each.description) for each in error.violations],
                reason=error.reason,
                metadata=metadata,
            ) from error
        except FailedPrecondition as error:
            field = prefix + error.metadata.get("field", "model")
            raise FailedPrecondition(
                f"{field}: {error.message}",
                reason=error.reason,
                metadata={**error.metadata, "field": field},
            ) from error

    def _calibrations(self, spec: deployment_pb2.DeploymentSpec, model: str) -> tuple[Calibration, ...]:
        """Returns the latest measurement for each kind of device."""
        latest: dict[str, records_pb2.CalibrationRecord] = {}
        for record in self._view.calibrations.items.values():
            if (record.engine, record.model) != (spec.engine, model):
                continue
            # The launch writes the declared quantization; unset and none load the same files.
            if _quantization(record.quantization) is not _quantization(spec.quantization):
                continue
            known = latest.get(record.device_product)
            if known is None or record.measure_time.ToNanoseconds() > known.measure_time.ToNanoseconds():
                latest[record.device_product] = record
        return tuple(
            calibration_of(record, product=self._short_name(product)) for product, record in latest.items()
        )

    def _checkpoint(self, spec: deployment_pb2.DeploymentSpec) -> str:
        """Returns the repository with the quantized files of a declared model.

        Raises:
            InvalidArgument: Field `quantization`: none is known.
        """
        asked = Quantization(spec.quantization)
        known = self._knowledge.checkpoint(spec.model, asked)
        if known is None:
            raise InvalidArgument.of(
                "quantization",
                f"the files of `{spec.model}` are not quantized, and {asked.name} is made beforehand: "
                f"declare an {asked.name} checkpoint by its directory or id, or leave quantization out",
            )
        return known

    def device_options(self, engine: types_pb2.Engine.ValueType) -> list[DeviceOption]:
        """Returns the devices that an engine can use, grouped by node.

        Where no node offers the engine yet, every device counts: an engine can be installed later. Lost
        nodes do not count, since they may never come back. Empty means that no device is known.
        """
        alive = [
            machine.inventory
            for machine in self._view.machines.items.values()
            if machine.state != types_pb2.NODE_STATE_LOST
        ]
        usable = [option for inventory in alive for option in self._options(inventory, engine)]
        return usable or [option for inventory in alive for option in self._options(inventory, None)]

    def _options(
        self, inventory: node_pb2.NodeInventory, engine: types_pb2.Engine.ValueType | None
    ) -> list[DeviceOption]:
        return [replace(each, product=self._short_name(each.product)) for each in _options(inventory, engine)]

    def _short_name(self, product: str) -> str:
        """As sentences write it; the driver's own string where the knowledge base does not have it."""
        gpu = self._knowledge.gpu(product) if product else None
        return gpu.short_name if gpu is not None else product


def calibration_of(record: records_pb2.CalibrationRecord, *, product: str) -> Calibration:
    """Reads a measurement; `product` is the device's name as sizing knows it."""
    return Calibration(
        product=product,
        engine_version=record.engine_version,
        tensor_parallel=max(1, record.tensor_parallel),
        max_model_len=record.max_model_len,
        weights_bytes=record.weights_bytes if record.HasField("weights_bytes") else None,
        besides_cache_bytes=record.besides_cache_bytes if record.HasField("besides_cache_bytes") else None,
        kv_cache_bytes=record.kv_cache_bytes if record.HasField("kv_cache_bytes") else None,
        kv_cache_tokens=record.kv_cache_tokens if record.HasField("kv_cache_tokens") else None,
    )


def _quantization(value: types_pb2.Quantization.ValueType) -> Quantization:
    return Quantization(value) if value else Quantization.NONE


def _made_beforehand(spec: deployment_pb2.DeploymentSpec, facts: ModelFacts) -> bool:
    """Tells whether the files lack the asked quantization; no engine makes AWQ or GPTQ on loading."""
    asked = Quantization(spec.quantization)
    return asked in {Quantization.AWQ, Quantization.GPTQ} and facts.quantization is Quantization.NONE


def _options(
    inventory: node_pb2.NodeInventory, engine: types_pb2.Engine.ValueType | None
) -> list[DeviceOption]:
    kinds = {
        kind
        for environment in inventory.engines
        if environment.engine == engine and not environment.unavailable_reason
        for kind in environment.device_kinds
    }
    equal = Counter(
        (device.kind, device.memory_bytes, device.product)
        for device in inventory.devices
        if engine is None or device.kind in kinds
    )
    return [
        DeviceOption(
            kind=DeviceKind(kind),
            memory_bytes=memory_bytes,
            count=count,
            node=inventory.node,
            product=product,
        )
        for (kind, memory_bytes, product), count in equal.items()
    ]
