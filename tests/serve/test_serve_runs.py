"""`pyrl train METHOD --tinker URL`: the same run on a server and here."""

from __future__ import annotations

import json
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_serve_sampling import PROMPT, logprobs
from tinker_server import TOKEN, Server
from torch import Tensor

from pyrl.engine import RUNNING, Branches, EngineError, EngineFailure
from pyrl.engine.admission import Admission
from pyrl.logits.sampling import Sampling
from pyrl.remote import service as remote_service
from pyrl.remote.engine import RemoteEngine
from pyrl.remote.service import Service
from pyrl.run.checkpoint import CheckpointError
from pyrl.run.parsing import settings
from pyrl.train import Trainer

Env = pytest.MonkeyPatch
RUN: dict[str, Any] = {
    "model": "demo",
    "data": "demo:train",
    "lora.rank": 4,
    "sample.votes": 6,
    "sample.train": 6,
    "sample.temperature": 1.0,
    "sample.max_tokens": 21,
    "updates_per_step": 2,
    "loss.kl.coef": 0.01,
    "steps": 2,
    "prompts_per_step": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "schedule": "constant",
    "extractor": "whole",
    "equivalence": "exact",
    "chat": False,
    "threads": 1,
    "eval_before": False,
    "eval_after": False,
    "save_every": 1,
    "loggers": [],
}


@pytest.fixture(autouse=True)
def token(monkeypatch: Env) -> None:
    monkeypatch.setenv("TINKER_API_KEY", TOKEN)


def trained(method: str, output: Path, **values: Any) -> Trainer:
    trainer = Trainer(settings(method, output=str(output), **(RUN | values)))
    trainer.train()
    trainer.close()
    return trainer


def rows(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["step"]]


def on_server(server: Server, output: Path) -> dict[str, Tensor]:
    """The trained adapter of a run on the server."""
    path = json.loads((output / "report.json").read_text())["facts"]["trained weights"]
    folder = server.output / path.removeprefix("tinker://")
    return load_file(folder / "adapter_model.safetensors")


def close(one: dict[str, Tensor], other: dict[str, Tensor], within: float) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[n], other[n], rtol=0, atol=within) for n in one)


def test_a_run_on_a_server_is_the_run_here_and_goes_on_from_where_it_was_saved(
    server: Server, tmp_path: Path
) -> None:
    here, there, again = (tmp_path / name for name in ("here", "there", "again"))
    trained("ttrl", here)
    trained("ttrl", there, tinker=server.url)
    own, remote = rows(here), rows(there)
    for row, other in zip(own, remote, strict=True):
        assert (row["num_tokens"], row["reward"]) == (other["num_tokens"], other["reward"])
        for name in ("loss", "kl", "grad_norm"):
            assert other[name] == pytest.approx(row[name], abs=1e-4), name
    weights = on_server(server, there)
    assert close(weights, load_file(here / "model" / "adapter_model.safetensors"), 1e-5)
    assert max(float(w.abs().max()) for n, w in weights.items() if "lora_B" in n) > 1e-3

    trained("ttrl", again, tinker=server.url, steps=1)
    trained("ttrl", again, tinker=server.url, resume=True)
    assert [row["num_tokens"] for row in rows(again)] == [row["num_tokens"] for row in remote]
    assert close(on_server(server, again), weights, 1e-6)
    with pytest.raises(CheckpointError, match="expected --tinker URL if the weights are on a serv"):
        trained("ttrl", again, resume=True, steps=3)


def test_trees_grow_and_train_on_a_server(server: Server, tmp_path: Path) -> None:
    forked = {"tinker": server.url, "steps": 1, "fork.mask_tail": 1, "sample.votes": 10}
    trainer = trained("ettrl", tmp_path / "ettrl", **forked)
    [row] = rows(tmp_path / "ettrl")
    assert row["tree/forks"] > 0
    assert trainer.learner.changed
    pruning = {
        "tinker": server.url,
        "steps": 1,
        "fork.cooldown": 2,
        "fork.group_window": 2,
        "fork.min_tokens": 1,
        "prune.tail_window": 2,
        "prune.decline_run": 2,
        "remote.chunk": 4,
    }
    trainer = trained("echo", tmp_path / "echo", **pruning)
    [row] = rows(tmp_path / "echo")
    # What was asked for beyond a pruned branch is no token of the run, and was drawn all the same.
    assert trainer.engine.work().decode_tokens >= row["num_tokens"]


def test_chunks_forks_and_entropies_are_those_of_the_model(server: Server) -> None:
    service = Service(server.url, "demo", 60.0)
    vocabulary = logprobs(PROMPT).shape[1]
    engine = RemoteEngine(service, [1], Admission(vocabulary), max_rows=2, chunk=3, top=vocabulary)
    engine.load_weights([("sampler", service.untrained())], 0)
    engine.start(Sampling())
    ids = np.arange(3)
    engine.submit(
        Branches(
            [np.array(PROMPT, np.int32)],
            np.zeros(3, np.int64),
            ids,
            np.array([1, 2, (1 << 64) - 1], np.uint64),
            np.array([8, 8, 5]),
            retain=True,
        )
    )
    path: dict[int, list[tuple[int, float, float, int]]] = {}
    while len((sampled := engine.step()).branch_B):
        assert len(sampled.branch_B) <= 2
        for b, *told in zip(
            sampled.branch_B.tolist(),
            sampled.token_B.tolist(),
            sampled.logprob_B.tolist(),
            sampled.entropy_B.tolist(),
            sampled.finish_B.tolist(),
            strict=True,
        ):
            path.setdefault(b, []).append(tuple(told))
        if 9 not in path and len(path[0]) == 3:
            engine.fork(0, 2, np.array([9]), np.array([7], np.uint64))
            path[9] = path[0][:2]
    assert path.keys() == {0, 1, 2, 9}
    for branch, told in path.items():
        tokens, logprob_T, entropy_T, finish_T = zip(*told, strict=True)
        assert tokens[-1] == 1 or len(tokens) == (5 if branch == 2 else 8)
        assert finish_T[-1] != RUNNING
        full_TV = logprobs([*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
        chosen_T = full_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert logprob_T == pytest.approx(chosen_T.tolist(), abs=1e-4)
        whole_T = -(full_TV.exp() * full_TV).sum(1)
        assert entropy_T == pytest.approx(whole_T.tolist(), abs=1e-4)
    own = [len(told) - 2 * (branch == 9) for branch, told in path.items()]
    assert engine.work().decode_tokens >= sum(own)


def test_what_a_server_does_not_have_is_one_sentence(server: Server, monkeypatch: Env) -> None:
    with pytest.raises(EngineError, match=r"^model: http.* has .*demo.model, got 'Qwen/Q'"):
        Service(server.url, "Qwen/Q", 60.0)
    hasty = Service(server.url, "demo", 1e-6)
    with pytest.raises(
        EngineFailure, match=r"expected an answer within 1e-06 s \(--remote.timeout"
    ):
        hasty.wait(Future())
    with pytest.raises(EngineFailure, match=f"^{server.url}: expected log-probs with the answer"):
        hasty.told("log-probs", None)
    monkeypatch.setenv("TINKER_API_KEY", "tml-other")
    with pytest.raises(EngineError, match=r"the server refuses: .*expected the token"):
        Service(server.url, "demo", 60.0)


@pytest.mark.parametrize("release", ["0.24.1", "0.39.0"])
def test_an_untested_sdk_is_one_sentence(release: str, monkeypatch: Env) -> None:
    assert version("tinker") != release
    monkeypatch.setattr(remote_service, "version", lambda name: release)
    with pytest.raises(EngineError, match=rf"from 0.25.0 to 0.38.0, .*got {release}; pip install"):
        Service("http://127.0.0.1:9", "demo", 60.0)
