import pytest

from router.openai.errors import Refusal
from router.openai.multipart import is_multipart, parse_multipart

KIND = "multipart/form-data; boundary=B.1"


def part(name: str, value: bytes, *, more: str = "") -> bytes:
    return f'--B.1\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


END = b"--B.1--\r\n"
FILE = part("file", b"\r\n--B.0\r\n\x00\xff" * 100, more='; filename="a.wav"\r\nContent-Type: audio/wav')


@pytest.mark.parametrize("fields", [[FILE, part("model", b"m")], [part("model", b"m"), FILE]])
def test_the_model_is_read_and_renamed(fields: list[bytes]) -> None:
    body = b"".join([*fields, END])
    parsed = parse_multipart(body, KIND)
    assert (parsed.model, parsed.stream) == ("m", False)
    assert parsed.renamed(body, "other/é") == body.replace(
        part("model", b"m"), part("model", "other/é".encode())
    )


@pytest.mark.parametrize(
    ("value", "stream"), [(b"true", True), (b"1", True), (b"false", False), (b"", False)]
)
def test_the_stream_field(value: bytes, stream: bool) -> None:
    body = part("stream", value) + part("model", b"m") + END
    assert parse_multipart(body, 'Multipart/Form-Data;charset=x; BOUNDARY="B.1"').stream is stream


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (END, KIND),
        (b"", KIND),
        (FILE + END, KIND),
        (part("model", b"") + END, KIND),
        (part("model", b"m" * 2000) + END, KIND),
        (part("model", b"\xff") + END, KIND),
        (part("model", b"m"), KIND),
        (part("model", b"m") + END, "multipart/form-data"),
        (b"preamble " + part("x", b"1") * 100 + part("model", b"m") + END, KIND),
    ],
)
def test_what_names_no_model_is_refused(body: bytes, kind: str) -> None:
    with pytest.raises(Refusal) as refusal:
        parse_multipart(body, kind)
    assert refusal.value.status == 400


def test_which_content_types_are_forms() -> None:
    assert is_multipart("Multipart/Form-Data; boundary=x")
    assert not is_multipart("application/json")
    assert not is_multipart("")
