"""`millrace apply`: make the cluster what the files say.

In come declarations, out comes for each model what was done: created, configured or unchanged. A new
deployment's key is printed once, before anything else can go wrong. Applying twice changes nothing; what
a file does not say (replicas) is left as it is on an existing deployment. Files are checked completely
before the first call.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from millrace_client import errors
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace.core.v1.deployment_pb2 import Deployment, DeploymentSpec
    from millrace.core.v1.sizing_pb2 import Sizing

    from millrace_client.cli.documents import Document, ModelEntry
    from millrace_client.client import MillraceClient

# The spec may be changed by others between our read and our write; more than this is a fight.
ATTEMPTS_MAX = 3
# What the server takes where a spec does not say.
PRIORITY_DEFAULT = 5


@dataclass(slots=True)
class Applied:
    """What was done for one model.

    Attributes:
        deployment: The resource after it.
        result: created, configured or unchanged.
        endpoint: Where to send requests; empty for an existing one.
        api_key: Key of a new deployment.
        watch_url: WebSocket of a new deployment.
        sizing: What one replica needs; None where the server did not say.
        note: Something that the user should know.
    """

    deployment: "Deployment"
    result: str
    endpoint: str = ""
    api_key: str = ""
    watch_url: str = ""
    sizing: "Sizing | None" = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.deployment.namespace, self.deployment.name


@command
def apply(
    session: Session,
    files: Annotated[
        list[str],
        typer.Option("-f", "--file", help="JSON or YAML file, - for stdin; may be repeated.", metavar="FILE"),
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it serves, or has failed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and size, and change nothing.")] = False,
) -> None:
    """Declare models, or change them to what the files say.

    Examples:
      millrace apply -f qwen.json --wait
      millrace apply -f team.yaml -n team-ai --dry-run
      echo '{"models": [{"name": "tiny", "model": "./tiny"}]}' | millrace apply -f -

    A model path that begins with ./ or ../ is taken from the file's folder. The key of a new deployment
    is shown this once. With --wait the exit code is 1 when a deployment fails, with its log's last lines.
    """
    from millrace_client.cli.documents import read_documents

    documents = [_with_namespace(session, each) for each in read_documents(files)]
    session.run(lambda client: _apply(session, client, documents, wait=wait, dry_run=dry_run), waiting=wait)


def _with_namespace(session: Session, document: "Document") -> "Document":
    from dataclasses import replace

    asked = session.options.namespace
    if asked and document.namespace and asked != document.namespace:
        raise errors.InvalidArgument(
            f"{document.source} is for namespace {document.namespace}, and -n says {asked}: give one of them"
        )
    # With no namespace anywhere the server generates one.
    return replace(document, namespace=document.namespace or session.context.namespace)


async def _apply(
    session: Session,
    client: "MillraceClient",
    documents: "list[Document]",
    *,
    wait: bool,
    dry_run: bool,
) -> None:
    applied: list[Applied] = []
    failure = ""
    try:
        for document in documents:
            for each in await _apply_named(session, client, document, dry_run=dry_run):
                applied.append(each)
                if not session.structured:
                    _show(session, each, dry_run=dry_run)
        if wait and not dry_run:
            await _wait(session, client, applied)
    except errors.MillraceError as error:
        failure = error.message
        raise
    finally:
        # Also after a failure or Ctrl-C: the keys in it are shown only now.
        if session.structured and (applied or not failure):
            session.emit({"deployments": [_data(each, dry_run=dry_run) for each in applied]})


async def _apply_named(
    session: Session, client: "MillraceClient", document: "Document", *, dry_run: bool
) -> list[Applied]:
    """Applies a document; what the server finds wrong in it is told with the file's name."""
    try:
        return await _apply_document(session, client, document, dry_run=dry_run)
    except (errors.InvalidArgument, errors.FailedPrecondition) as error:
        error.message = f"{document.source}: {error.message}"
        raise


async def _apply_document(
    session: Session, client: "MillraceClient", document: "Document", *, dry_run: bool
) -> list[Applied]:
    existing = {entry.name: await _find(client, document.namespace, entry.name) for entry in document.models}
    applied: list[Applied] = []
    new = [entry.message() for entry in document.models if existing[entry.name] is None]
    if new:
        response = await client.declare(
            new,
            namespace=document.namespace,
            metadata=document.metadata,
            validate_only=dry_run,
            **session.call_timeouts,
        )
        applied.extend(
            Applied(
                each.deployment,
                "created",
                endpoint=each.endpoint,
                api_key=each.api_key,
                watch_url=each.watch_url,
                sizing=each.sizing if each.HasField("sizing") else None,
            )
            for each in response.deployments
        )
    for entry in document.models:
        found = existing[entry.name]
        if found is not None:
            applied.append(await _configure(session, client, document, entry, found, dry_run=dry_run))
    order = {entry.name: position for position, entry in enumerate(document.models)}
    return sorted(applied, key=lambda each: order.get(each.deployment.name, len(order)))


async def _find(client: "MillraceClient", namespace: str, name: str) -> "Deployment | None":
    if not namespace:
        return None
    try:
        return await client.get(namespace, name)
    except errors.NotFound:
        return None


async def _configure(
    session: Session,
    client: "MillraceClient",
    document: "Document",
    entry: "ModelEntry",
    found: "Deployment",
    *,
    dry_run: bool,
) -> Applied:
    """Changes the fields that differ, and only those."""
    from millrace_client.cli.render import message_data

    note = ""
    if document.metadata is not None and message_data(found).get("metadata", {}) != document.metadata:
        note = "the metadata differs; it is set when a deployment is created and stays as it is"
    for attempt in range(1, ATTEMPTS_MAX + 1):
        wanted, changed = changed_fields(found.spec, entry)
        if not changed:
            return Applied(found, "unchanged", sizing=_sizing(found), note=note)
        try:
            updated = await client.update(
                found.namespace,
                found.name,
                wanted,
                fields=changed,
                etag=found.etag,
                validate_only=dry_run,
                **session.call_timeouts,
            )
        except errors.Conflict:
            if attempt == ATTEMPTS_MAX:
                raise
            found = await client.get(found.namespace, found.name)
            continue
        text = "changed: " + ", ".join(changed)
        return Applied(updated, "configured", sizing=_sizing(updated), note=f"{text}; {note}".strip("; "))
    raise AssertionError("unreachable: the last attempt returns or raises")


def changed_fields(current: "DeploymentSpec", entry: "ModelEntry") -> "tuple[DeploymentSpec, list[str]]":
    """Returns the spec that a file wants and the fields in which it differs from the current one.

    What the server substitutes for an absent engine or quantization counts as equal to absence. Replicas
    that the file does not name stay what they are, so that `apply` does not undo `scale`.
    """
    from google.protobuf.json_format import MessageToDict
    from millrace.core.v1 import types_pb2
    from millrace.core.v1.deployment_pb2 import DeploymentSpec

    declared = entry.message()
    wanted = DeploymentSpec(
        model=declared.model,
        engine=declared.engine or types_pb2.ENGINE_VLLM,
        quantization=declared.quantization or types_pb2.QUANTIZATION_NONE,
        max_model_len=declared.max_model_len if declared.HasField("max_model_len") else None,
        replicas=declared.replicas if declared.HasField("replicas") else None,
        extra_args=declared.extra_args if declared.HasField("extra_args") else None,
        rollout=declared.rollout if declared.HasField("rollout") else None,
        autoscale=declared.autoscale if declared.HasField("autoscale") else None,
        priority=declared.priority if declared.HasField("priority") else None,
        placement=declared.placement if declared.HasField("placement") else None,
        routing=declared.routing if declared.HasField("routing") else None,
    )
    changed: list[str] = []
    if wanted.model != current.model:
        changed.append("model")
    if wanted.engine != (current.engine or types_pb2.ENGINE_VLLM):
        changed.append("engine")
    if wanted.quantization != (current.quantization or types_pb2.QUANTIZATION_NONE):
        changed.append("quantization")
    if wanted.HasField("max_model_len") != current.HasField("max_model_len") or (
        wanted.max_model_len != current.max_model_len
    ):
        changed.append("max_model_len")
    # An unset number of replicas means one.
    if wanted.HasField("replicas") and wanted.replicas != (
        current.replicas if current.HasField("replicas") else 1
    ):
        changed.append("replicas")
    if MessageToDict(wanted.extra_args) != MessageToDict(current.extra_args):
        changed.append("extra_args")
    if wanted.HasField("rollout") != current.HasField("rollout") or wanted.rollout != current.rollout:
        changed.append("rollout")
    if wanted.HasField("autoscale") != current.HasField("autoscale") or wanted.autoscale != current.autoscale:
        changed.append("autoscale")
    if (wanted.priority or PRIORITY_DEFAULT) != (current.priority or PRIORITY_DEFAULT):
        changed.append("priority")
    if wanted.placement != current.placement:
        changed.append("placement")
    if wanted.HasField("routing") != current.HasField("routing") or wanted.routing != current.routing:
        changed.append("routing")
    return wanted, changed


def _sizing(deployment: "Deployment") -> "Sizing | None":
    return deployment.status.sizing if deployment.status.HasField("sizing") else None


async def _wait(session: Session, client: "MillraceClient", applied: list[Applied]) -> None:
    from millrace_client.cli.progress import WAIT_SECONDS, failure_report, progress_view, wait_ready

    with progress_view(color=not session.options.no_color) as view:
        result = await wait_ready(
            client,
            {each.key: each.deployment.generation for each in applied},
            view,
            timeout_seconds=session.options.timeout or WAIT_SECONDS,
        )
    for each in applied:
        latest = result.states.get(each.key)
        if latest is not None:
            each.deployment = latest
    session.complain(*failure_report(result))
    result.raise_failure()
    if not session.structured:
        for each in applied:
            session.write(f"{each.deployment.namespace}/{each.deployment.name} is ready")


def _show(session: Session, applied: Applied, *, dry_run: bool) -> None:
    from millrace_client.cli.render import bytes_text, table

    name = "/".join(applied.key)
    session.write(f"{name} {applied.result}" + (" (dry run: nothing was changed)" if dry_run else ""))
    if applied.note:
        session.write(f"  {applied.note}")
    if applied.endpoint and not dry_run:
        session.write(f"  endpoint  {applied.endpoint}")
    if applied.api_key:
        session.write(f"  api key   {applied.api_key}")
        session.write("            shown once: keep it now, it is stored as a hash")
    if applied.watch_url and not dry_run:
        session.write(f"  watch     {applied.watch_url}")
    if dry_run and applied.sizing is not None:
        rows = [(f"  {each.name}", bytes_text(each.bytes), each.explanation) for each in applied.sizing.terms]
        rows.append(("  total", bytes_text(applied.sizing.total_bytes), applied.sizing.summary))
        session.show(table(("  TERM", "MEMORY", "HOW"), rows))


def _data(applied: Applied, *, dry_run: bool) -> dict[str, Any]:
    from millrace_client.cli.render import message_data

    return {
        "namespace": applied.deployment.namespace,
        "name": applied.deployment.name,
        "result": applied.result,
        "dry_run": dry_run,
        "endpoint": applied.endpoint,
        "api_key": applied.api_key,
        "watch_url": applied.watch_url,
        "note": applied.note,
        "sizing": message_data(applied.sizing) if applied.sizing is not None else None,
        "deployment": message_data(applied.deployment),
    }
