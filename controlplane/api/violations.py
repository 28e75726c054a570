"""What is wrong with a request, collected so that a caller hears everything at once."""

from core.errors import FieldViolation, InvalidArgument


class Violations:
    """Collects wrong fields.

    Attributes:
        found: In the order in which they were found.
    """

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Notes one wrong field."""
        self.found.append(FieldViolation(field, description))

    def raise_if_any(self) -> None:
        """Raises what was found.

        Raises:
            InvalidArgument: Something was found.
        """
        if self.found:
            raise InvalidArgument(self.found)
