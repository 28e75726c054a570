"""Whether what a user wants could ever be held: by a machine, by the pinned devices, by the quota.

In come checked specs, out come their sizings, or every reason against them. Whether there is room now is
the scheduler's question, not this one's: what could be held later is accepted.
"""

import asyncio
from collections.abc import Sequence

from millrace.core.v1 import deployment_pb2, sizing_pb2
from millrace.state.v1 import records_pb2

from controlplane.api.context import ApiContext
from controlplane.api.placement import check_pin_sizes, check_pins_known, check_quota
from controlplane.api.validation import Violations
from controlplane.convert import desired_replicas
from core.errors import InvalidArgument, MillraceError

# Models are read from disk, or from a hub that may be slow: a few at once.
_SIZED_AT_ONCE = 16


async def size_one(
    context: ApiContext, spec: deployment_pb2.DeploymentSpec, namespace: str, prefix: str
) -> sizing_pb2.Sizing:
    """Sizes one replica and compares it with what is known.

    Args:
        context: What the API knows.
        spec: Checked, with defaults.
        namespace: Tenant.
        prefix: Put before field names in errors, such as `models[0].`.

    Raises:
        InvalidArgument: The model cannot be found, or a pin names what is not there.
        FailedPrecondition: No known node, or the quota, could ever hold it.
    """
    violations = Violations()
    check_pins_known(spec, context.view.machines.get, prefix, violations.add)
    violations.raise_if_any()
    sizing = await context.sizer.size(spec, prefix)
    check_pin_sizes(spec, sizing, prefix, violations.add)
    violations.raise_if_any()
    check_quota(spec, sizing, namespace, context.view.quota(namespace), prefix)
    return sizing


def check_fitting(
    context: ApiContext,
    spec: deployment_pb2.DeploymentSpec,
    record: records_pb2.DeploymentRecord,
    prefix: str,
) -> None:
    """Compares a spec whose engines stay as they are with what is known.

    Raises:
        InvalidArgument: A pin names what is not there.
        FailedPrecondition: The quota could never hold it.
    """
    violations = Violations()
    if spec.placement != record.spec.placement:
        check_pins_known(spec, context.view.machines.get, prefix, violations.add)
        check_pin_sizes(spec, record.sizing, prefix, violations.add)
    violations.raise_if_any()
    if desired_replicas(spec) > desired_replicas(record.spec):
        check_quota(spec, record.sizing, record.namespace, context.view.quota(record.namespace), prefix)


async def size_all(
    context: ApiContext, specs: Sequence[deployment_pb2.DeploymentSpec], namespace: str
) -> list[sizing_pb2.Sizing]:
    """Sizes every model of a declaration and reports everything that is wrong at once.

    Raises:
        InvalidArgument: With every wrong field.
        FailedPrecondition: The first that could never be held.
    """
    limit = asyncio.Semaphore(_SIZED_AT_ONCE)

    async def one(index: int) -> sizing_pb2.Sizing | MillraceError:
        async with limit:
            try:
                return await size_one(context, specs[index], namespace, f"models[{index}].")
            except MillraceError as error:
                return error

    outcomes = await asyncio.gather(*(one(index) for index in range(len(specs))))
    wrong = [each for each in outcomes if isinstance(each, InvalidArgument)]
    if len(wrong) > 1:
        raise InvalidArgument(
            [violation for error in wrong for violation in error.violations], reason=wrong[0].reason
        )
    if wrong:
        raise wrong[0]
    for outcome in outcomes:
        if isinstance(outcome, MillraceError):
            raise outcome
    return [each for each in outcomes if isinstance(each, sizing_pb2.Sizing)]
