"""The hot path judges no byte string otherwise than aiohttp, and engines see the same requests."""

import random

from tests.support.wire_fuzz import (
    BODY,
    ODD_BODIES,
    ODD_HEADERS,
    ODD_LINES,
    compare,
    cut,
    random_bytes,
    request,
    two_sides,
)


async def test_odd_requests_alone_and_behind_a_good_one() -> None:
    async with two_sides() as sides:
        key = sides[0].cluster.api_key
        good = request(key)
        odd = [
            *(request(key, headers=[header]) for header in ODD_HEADERS),
            *(request(key, line=line) for line in ODD_LINES),
            *(request(key, body=body) for body in ODD_BODIES),
            *(request(key, length=length) for length in (b"", b"059", b"+59", b"59, 59", b"0x3b", b"59 59")),
            request("sk-wrong"),
            good[:-1],
            good + b"\r\n",
        ]
        for data in odd:
            for pieces in ([data], cut(good + data, ())):
                hot, plain = await compare(sides, pieces)
                assert hot == plain, pieces


async def test_a_good_request_is_served_however_it_is_cut() -> None:
    chance = random.Random(7)
    async with two_sides() as sides:
        data = request(sides[0].cluster.api_key, headers=[b"X-Kept: 1"]) * 3
        for _ in range(30):
            hot, plain = await compare(sides, cut(data, [chance.randrange(len(data)) for _ in range(5)]))
            assert hot == plain
            assert hot.status_classes == (2, 2, 2)
            assert [body for _, body, _ in hot.seen] == [BODY] * 3
            assert not hot.closed


async def test_random_bytes() -> None:
    chance = random.Random(20)
    async with two_sides() as sides:
        for _ in range(150):
            data = random_bytes(chance, sides[0].cluster.api_key)
            places = [chance.randrange(len(data)) for _ in range(chance.choice((0, 1, 4)))]
            hot, plain = await compare(sides, cut(data, places))
            assert hot == plain, cut(data, places)
