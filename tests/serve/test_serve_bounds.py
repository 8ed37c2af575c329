"""What a server holds is bounded, and no request is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from pyrl.models import load_model
from pyrl.serve import futures, policies
from pyrl.serve.application import Application
from pyrl.serve.body import Body, RequestError
from pyrl.serve.futures import Futures, Job
from pyrl.serve.service import Creation, Service, sampler_writing
from pyrl.serve.settings import ServeSettings


def echo(works: Sequence[bytes]) -> list[bytes]:
    if b"wrong" in works:
        raise KeyError("wrong")
    return [bytes(work) for work in works]


def service(output: Path, **settings: int) -> Service:
    model, tokenizer = load_model("demo")
    return Service(ServeSettings("demo", output=output, **settings), model, tokenizer)


def test_queue_and_results_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures, "WAITING", 4)
    monkeypatch.setattr(futures, "KEPT", 3)
    monkeypatch.setattr(futures, "KEPT_BYTES", 1000)

    async def run() -> None:
        queue = Futures()
        for n in range(4):
            queue.submit(Job(f"r{n}", b"x", echo, 10, mate="same" if n % 2 else None))
        with pytest.raises(RequestError, match="got 4 with 0 MiB; try again") as refused:
            queue.submit(Job("r4", b"x", echo, 10))
        assert refused.value.status == 429
        serving = asyncio.create_task(queue.serve())
        assert [await queue.result(f"r{n}") for n in (1, 2, 3)] == [b"x"] * 3
        queue.submit(Job("wrong", b"wrong", echo, 10))
        queue.submit(Job("large", b"y" * 2000, echo, 10))
        assert await queue.result("wrong") == {"error": "KeyError: 'wrong'", "category": "server"}
        assert await queue.result("large") == b"y" * 2000
        for gone in ("r0", "r1", "wrong"):
            with pytest.raises(RequestError, match="whose result is still kept"):
                await queue.result(gone)
        serving.cancel()
        queue.close()

    asyncio.run(run())


def test_a_request_that_is_sent_again_is_done_once(tmp_path: Path) -> None:
    done: list[int] = []

    def count(works: Sequence[int]) -> list[bytes]:
        done.extend(works)
        return [b"" for _ in works]

    async def run() -> None:
        app = Application(service(tmp_path), "tml-t")
        serving = asyncio.create_task(app._futures.serve())
        for number in (1, 1, 2, 1, 2):
            assert app._numbered(number, "m", number, count, 1)["request_id"] == f"m:{number}"
        assert await app._futures.result("m:2") == b""
        serving.cancel()
        app._futures.close()

    asyncio.run(run())
    assert done == [1, 2]


def test_a_model_whose_client_has_left_makes_room_and_is_kept_on_disk(tmp_path: Path) -> None:
    served = service(tmp_path, max_models=2)
    here, gone = served.sessions.new(), served.sessions.new()
    served.create([Creation(f"{gone}:train:0", rank=2)])
    served.create([Creation(f"{here}:train:0", rank=2)])
    served._trained[f"{gone}:train:0"].saved = False
    served.sessions.end(gone)
    served.create([Creation(f"{here}:train:1", rank=2)])
    with pytest.raises(RequestError, match=f"{gone}:train:0/weights/unsaved"):
        served.known(f"{gone}:train:0")
    with pytest.raises(RequestError, match="fewer than 2 models that clients train"):
        served.create([Creation(f"{here}:train:2", rank=2)])
    back = f"tinker://{gone}:train:0/weights/unsaved"
    served.create([Creation(f"{here}:train:1", path=back, optimizer=True)])
    assert served.info(f"{here}:train:1")["lora_rank"] == 2


def test_only_the_newest_unnamed_weights_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "SNAPSHOTS", 2)
    served = service(tmp_path)
    served.create([Creation("s:train:0", rank=2)])
    served.save([sampler_writing(Body({"path": "mine"}), "s:train:0")])
    for number in (8, 9, 10):
        body = Body({"sampling_session_seq_id": number})
        [told] = served.save([sampler_writing(body, "s:train:0")])
        assert told["sampling_session_id"] == f"s:sample:{number}"
    left = sorted(path.name for path in (tmp_path / "s:train:0" / "sampler_weights").iterdir())
    assert left == ["mine", "session-10", "session-9"]
    with pytest.raises(RequestError, match="does not begin with 'session-'"):
        sampler_writing(Body({"path": "session-1"}), "s:train:0")
