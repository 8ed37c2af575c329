"""What a server does not do: each request that it cannot serve gets one sentence."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
import tinker
from tinker import types
from tinker_server import TOKEN, Server, datum, prompt, ready, served_name, trainee

PROMPT, RESPONSE = [5, 3, 6, 4, 14], [3, 4, 5, 6, 1]
PROTOBUF = "application/x-protobuf"
SAMPLE = {
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
    "base_model": served_name(),
    "sampling_params": {"max_tokens": 2},
}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("create_session", b"{", 400, "body: expected a JSON object"),
        ("create_session", b"[" * 100_000, 400, "body: expected a JSON object"),
        ("create_session", [], 400, "body: expected a JSON object, got []"),
        ("create_session", {}, 400, "sdk_version: expected a text, got nothing"),
        ("create_session", {"sdk_version": "0.9.0"}, 400, "from 0.25.0 to 0.38.0"),
        ("client/config", {"sdk_version": "0.99.1"}, 400, "got 0.99.1"),
        ("create_sampling_session", {"session_id": "s-1"}, 404, "a session of this server"),
        ("get_info", {"model_id": "m"}, 404, "a model that is trained here, got 'm'"),
        ("optim_step", {"model_id": 3}, 400, "model_id: expected a text, got 3"),
        ("weights_info", {"tinker_path": "../../etc"}, 400, "expected tinker://MODEL/weights"),
        ("weights_info", {"tinker_path": "tinker://../weights/a"}, 400, "got 'tinker://.."),
        ("weights_info", {"tinker_path": "tinker://m/weights/a"}, 404, "that were saved here"),
        ("retrieve_future", {"request_id": "r"}, 410, "whose result is still kept"),
        ("forward_backward", b"x", 400, "body: expected the content type"),
        ("nothing", {}, 404, "an address that pyrl serves, got '/api/v1/nothing'"),
        ("asample", SAMPLE | {"base_model": "other"}, 400, "which is served, got 'other'"),
        ("asample", SAMPLE | {"num_samples": 0}, 400, "a whole number in 1..1024, got 0"),
        ("asample", SAMPLE | {"sampling_params": {"top_p": 2}}, 400, "0 < top_p <= 1, got 2.0"),
        ("asample", SAMPLE | {"sampling_params": {"max_tokens": 10**6}}, 400, "max_tokens: exp"),
        ("asample", SAMPLE | {"sampling_params": {"stop": [1, "a"]}}, 400, "stop: expected a text"),
        ("asample", SAMPLE | {"prompt": {"chunks": [{"type": "image"}]}}, 400, "'encoded_text'"),
        ("asample", SAMPLE | {"target_prompt_logprobs": {}}, 400, "does not have it"),
    ],
)
def test_a_request_that_cannot_be_served_says_why(
    server: Server, path: str, body: object, status: int, said: str
) -> None:
    code, answer = server.post(path, body)
    assert code == status, answer
    assert said in answer["detail"]
    assert "\n" not in answer["detail"]


def test_without_the_token_nothing_is_told(server: Server) -> None:
    for path in ("create_session", "forward_backward", "nothing", "retrieve_future"):
        code, answer = server.post(path, {}, token="tml-other")
        assert code == 401
        assert answer["detail"].startswith("X-API-Key: expected the token")
    with pytest.raises(tinker.AuthenticationError, match="expected the token"):
        server.client("tml-other").create_sampling_client(base_model=served_name()).result()


def broken(change: str) -> types.Datum:
    """A datum with something wrong."""
    good = datum(PROMPT, RESPONSE, weights=[1.0] * len(RESPONSE))
    inputs = dict(good.loss_fn_inputs)
    columns = {
        "missing": {"target_tokens": inputs["target_tokens"]},
        "short": inputs | {"weights": [1.0]},
        "infinite": inputs | {"weights": [float("nan")] * 9},
        "unknown": inputs | {"target_tokens": [*PROMPT[1:], *RESPONSE[:-1], 10**6]},
        "other": inputs | {"target_tokens": [2] * 9},
    }
    return types.Datum(model_input=good.model_input, loss_fn_inputs=columns[change])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "expected target_tokens, weights, got target_tokens"),
        ("short", "expected a number for each of 9 input tokens, got 1"),
        ("infinite", "expected finite numbers"),
        ("unknown", "expected token ids in 0"),
        ("other", "moved by one place wherever weights is not 0"),
    ],
)
def test_a_datum_that_cannot_be_read_is_named(server: Server, change: str, said: str) -> None:
    training = trainee(server.client())
    with pytest.raises(tinker.BadRequestError, match=said):
        training.forward_backward([broken(change)], "cross_entropy").result()


def test_a_loss_or_a_setting_that_is_not_there_is_named(server: Server) -> None:
    good = [datum(PROMPT, RESPONSE, weights=[1.0] * len(RESPONSE))]
    for name, config, said in (
        ("gspo", {}, "one of cross_entropy, importance_sampling, ppo, cispo, dro, got 'gspo'"),
        ("cross_entropy", {"beta": 1.0}, "expected no settings for cross_entropy, got beta"),
    ):
        with pytest.raises(tinker.BadRequestError, match=said):
            trainee(server.client()).forward_backward(good, name, config).result()
    with pytest.raises(tinker.RequestFailedError, match="a forward_backward since the last step"):
        trainee(server.client()).optim_step(types.AdamParams()).result()


def memory(server: Server) -> int:
    """MiB that the server holds."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) >> 10


def test_a_crowd_and_clients_that_vanish_lose_no_state(server: Server) -> None:
    data = [datum(PROMPT, RESPONSE, weights=[1.0] * len(RESPONSE))]
    training = trainee(server.client())
    training.forward_backward(data, "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    before = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    held, failed, told = memory(server), [], []

    def visit(number: int) -> None:
        client = ready(server.client().create_sampling_client(base_model=served_name()))
        params = types.SamplingParams(max_tokens=4, seed=number % 4, stop=[])
        sample = client.sample(prompt(PROMPT), 2, params).result(timeout=60)
        told.append((number % 4, tuple(tuple(s.tokens) for s in sample.sequences)))

    def vanish(number: int) -> None:
        with socket.create_connection((server.host, server.port)) as half:
            head = f"POST /api/v1/asample HTTP/1.1\r\nx-api-key: {TOKEN}\r\nhost: a\r\n"
            half.sendall(f"{head}content-length: 10000000\r\n\r\n".encode() + b"{" * 1_000_000)

    def burden(number: int) -> None:
        long = {"chunks": [{"type": "encoded_text", "tokens": [5] * 3_500_000}]}
        answers = [
            server.post("asample", SAMPLE | {"prompt": long}),
            server.post("asample", b" " * 10_000_000),
            server.post("forward_backward", b"\x0a" * 10_000_000, kind=PROTOBUF),
            server.post("asample", SAMPLE),
        ]
        failed.extend(a for a, c in zip(answers, (400, 400, 400, 200), strict=True) if a[0] != c)

    jobs = [(visit, 100), (vanish, 20), (burden, 3)]
    crowd = [threading.Thread(target=job, args=(n,)) for job, count in jobs for n in range(count)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join(90)
    assert failed == []
    assert len(told) == 100
    # A seed draws the same, whoever is sampled beside it.
    assert len({*told}) == 4
    assert memory(server) < held + 400
    after = training.forward(data, "cross_entropy").result().metrics["loss:sum"]
    assert after == before
