import orjson

from router.openai.response_ids import endpoint_of_response, name_response
from router.view.view import Endpoint, EndpointState


def endpoint(replica: str, engine: str = "vllm") -> Endpoint:
    return Endpoint("a", "d", replica, "http://h", "d", "m", EndpointState.READY, "i", 1, "n", engine=engine)


def test_an_id_leads_to_the_endpoint_that_made_it() -> None:
    endpoints = [endpoint(f"replica-{number}") for number in range(50)]
    for each in endpoints:
        body = b'{"model": "d", "input": "x"} '
        made = name_response(body, orjson.loads(body), each)
        response_id = orjson.loads(made)["request_id"]
        assert made.replace(f',"request_id":"{response_id}"'.encode(), b"") == body
        assert endpoint_of_response(response_id, endpoints) is each
        assert endpoint_of_response(response_id, [other for other in endpoints if other is not each]) is None


def test_ids_differ() -> None:
    made = {name_response(b'{"a":1}', {"a": 1}, endpoint("r")) for _ in range(100)}
    assert len(made) == 100


def test_ids_of_clients_and_engines_that_know_none_stay() -> None:
    body = b'{"request_id":"mine"}'
    assert name_response(body, orjson.loads(body), endpoint("r")) is body
    assert name_response(b'{"a":1}', {"a": 1}, endpoint("r", "external")) == b'{"a":1}'
    for wrong in ("mine", "", None, 7, "resp_" + "0" * 31):
        assert endpoint_of_response(wrong, [endpoint("r")]) is None
