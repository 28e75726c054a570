"""Reads the knowledge base from the data files beside this module.

In come JSON files of the package (`models/*.json`, `gpus.json`, `engines.json`), out comes a
`KnowledgeBase`; `load_environments` reads the matrix of `environments.json`. This is the part of sizing
that does I/O; what the data mean stands in `controlplane.sizing`. A new model family is a new file under
`models/` and nothing else.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import cast

from controlplane.knowledge.environments import Environments, read_operator_rows, read_rows
from controlplane.sizing import KnowledgeBase, knowledge_from_data


@cache
def load_knowledge() -> KnowledgeBase:
    """Reads the knowledge base once a process.

    Raises:
        ValueError: A data file is broken.
        InvalidArgument: A model's configuration in it is not complete.
    """
    folder = resources.files(__name__)
    models = sorted(
        (file for file in (folder / "models").iterdir() if file.name.endswith(".json")),
        key=lambda file: file.name,
    )
    return knowledge_from_data(
        [_read(file) for file in models], _read(folder / "gpus.json"), _read(folder / "engines.json")
    )


def load_environments(operator_file: Path | None = None) -> Environments:
    """Reads the matrix of environments.

    Args:
        operator_file: Rows of the operator's own, which come before those of the package.

    Raises:
        ValueError: A file is broken.
    """
    packaged = resources.files(__name__) / "environments.json"
    rows = read_rows(packaged.read_text(encoding="utf-8"), packaged.name)
    own = read_operator_rows(operator_file) if operator_file is not None else ()
    return Environments((*own, *rows), load_knowledge())


def _read(file: Traversable) -> Mapping[str, object]:
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the knowledge base's {file.name} is no valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"the knowledge base's {file.name} holds no object")  # noqa: TRY004 - a file's content is wrong, not a call
    return cast("Mapping[str, object]", parsed)
