"""Workers ask each other: a request was served by one of them, and any of them may be asked about it.

Each worker of a router listens on a socket in the folder that the supervisor made for them (owner only, gone
with it). A question is a request id and a line feed; the answer is the document as JSON, or nothing. In come
questions of other workers, out go answers; the one who was asked by HTTP asks all others at once, within one
limit of time. A lone worker has no folder and asks nobody.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

_PREFIX = "decisions-"
_SUFFIX = ".sock"
# A worker that does not answer within this is busy or gone; the operator asks again.
ASK_SECONDS = 1.0
QUESTION_BYTES_MAX = 512
ANSWER_BYTES_MAX = 4 * 1024 * 1024

Answerer = Callable[[str], bytes]


class Siblings:
    """The other workers of this router."""

    def __init__(self, folder: Path | None, answer: Answerer) -> None:
        """Takes the folder of the sockets, None for a lone worker, and what answers for this one."""
        self._folder = folder
        self._answer = answer
        self._own = None if folder is None else folder / f"{_PREFIX}{os.getpid()}{_SUFFIX}"

    async def serve(self) -> None:
        """Answers the others until cancelled."""
        if self._own is None:
            await asyncio.Event().wait()
            return
        # What a worker with this process id left behind is nobody's any more.
        self._own.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve_one, self._own, limit=QUESTION_BYTES_MAX)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            self._own.unlink(missing_ok=True)

    async def ask(self, request_id: str) -> bytes:
        """Returns the first answer that another worker has; empty for none."""
        if self._folder is None or len(request_id.encode()) >= QUESTION_BYTES_MAX or "\n" in request_id:
            return b""
        others = [each for each in self._folder.glob(f"{_PREFIX}*{_SUFFIX}") if each != self._own]
        answers = await asyncio.gather(*(_ask_one(each, request_id) for each in others))
        return next((each for each in answers if each), b"")

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                question = await reader.readline()
                writer.write(self._answer(question.decode(errors="replace").rstrip("\n")))
                await writer.drain()
        except (TimeoutError, ValueError, ConnectionError) as error:
            _log.info("question of another worker left unanswered", error=repr(error))
        finally:
            writer.close()


async def _ask_one(path: Path, request_id: str) -> bytes:
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(ASK_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(f"{request_id}\n".encode())
            answer = await reader.read(ANSWER_BYTES_MAX)
            while more := await reader.read(ANSWER_BYTES_MAX - len(answer)):
                answer += more
            return answer
    except (ConnectionRefusedError, FileNotFoundError):
        # Its worker is dead, and the folder must not fill up with what it left.
        _forget(path)
        return b""
    except (TimeoutError, OSError) as error:
        _log.info("another worker did not answer", socket=path.name, error=repr(error))
        return b""
    finally:
        if writer is not None:
            writer.close()


def _forget(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
