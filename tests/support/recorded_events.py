"""An event sink that keeps what it is told, for tests of whoever emits."""

from dataclasses import dataclass, field


@dataclass
class RecordedEvents:
    """Keeps events instead of writing them."""

    emitted: list[dict[str, object]] = field(default_factory=list)

    def emit(
        self,
        *,
        namespace: str,
        reason: str,
        message: str,
        source: str,
        deployment: str = "",
        replica: str = "",
        node: str = "",
        warning: bool = False,
    ) -> None:
        self.emitted.append(
            {
                "namespace": namespace,
                "reason": reason,
                "message": message,
                "deployment": deployment,
                "replica": replica,
                "node": node,
                "warning": warning,
                "source": source,
            }
        )

    def reasons(self) -> list[str]:
        return [str(each["reason"]) for each in self.emitted]

    def of(self, reason: str) -> list[dict[str, object]]:
        return [each for each in self.emitted if each["reason"] == reason]
