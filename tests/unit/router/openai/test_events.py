import pytest

from router.openai.events import EventCutter, EventTooLong, data_of, document_of, object_end


@pytest.mark.parametrize(
    ("stream", "events", "rest"),
    [
        (b"", [], b""),
        (b"data: a\n\ndata: b\n\n", [b"data: a\n\n", b"data: b\n\n"], b""),
        (b"data: a\n\nda", [b"data: a\n\n"], b"da"),
        (b": c\r\n\r\ndata: a\r\n\r\n", [b": c\r\n\r\n", b"data: a\r\n\r\n"], b""),
        (b"data: a\r\rdata: b\r\r.", [b"data: a\r\r", b"data: b\r\r"], b"."),
        (b"data: a\n\r\ndata: b\r\n\n", [b"data: a\n\r\n", b"data: b\r\n\n"], b""),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_events_are_cut_whatever_the_pieces(
    stream: bytes, events: list[bytes], rest: bytes, size: int
) -> None:
    cutter = EventCutter()
    found = [event for at in range(0, len(stream), size) for event in cutter.feed(stream[at : at + size])]
    assert b"".join(found) + cutter.held == stream
    assert [event.strip() for event in found] == [event.strip() for event in events]
    assert cutter.rest().strip() == rest
    assert cutter.held == b""


def test_what_is_held_back_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.openai.events.EVENT_BYTES_MAX", 10)
    cutter = EventCutter()
    cutter.feed(b"data: ")
    with pytest.raises(EventTooLong) as error:
        cutter.feed(b"12345")
    assert error.value.text == b"data: 12345"
    assert cutter.held == b""


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\n\n", b"a"),
        (b"data:  a\n\n", b" a"),
        (b"event: x\ndata: a\r\ndata: b\n\n", b"a\nb"),
        (b": data: a\n\n", b""),
        (b"database: a\n\n", b""),
        (b"data\n\n", b""),
    ],
)
def test_data_of_an_event(event: bytes, data: bytes) -> None:
    assert data_of(event) == data


def test_document_of_an_event() -> None:
    assert document_of(b'data: {"a":\ndata: 1}\n\n') == {"a": 1}
    assert document_of(b"data: [1]\n\n") is None
    assert document_of(b": c\n\n") is None


@pytest.mark.parametrize(
    ("text", "end"),
    [(b'{"a":{"b":"}\\"}"}} x', 18), (b"{}", 2), (b'{"a":"}', -1), (b"{{}", -1)],
)
def test_end_of_an_object(text: bytes, end: int) -> None:
    assert object_end(text, 0) == end
