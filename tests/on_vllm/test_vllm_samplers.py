"""`pyrl sampler`: a real server, driven over loopback; stand-ins do the rest in tests/engine."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from driven_engine import EOS, Driver
from small_llama import assert_same, small_llama
from stand_in_sampler import free_port
from tiny_run import make_trainer, stepped, tiny, tiny_run
from transformers import PreTrainedModel

from pyrl.demo.run import ttrl
from pyrl.engine import EngineFailure
from pyrl.engine.hf import HFEngine
from pyrl.engine.sync import Sync
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.engine.vllm.served import ServedEngine
from pyrl.engine.vllm.wire import model_shape
from pyrl.models import load_model
from pyrl.models.lora import LoRA
from pyrl.reward import RandomReward


class Served:
    """A sampler in a process of its own, which has the demo's tokenizer, and the model it began
    with."""

    def __init__(self, folder: Path) -> None:
        _, tokenizer = load_model("demo")
        special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        small_llama(vocab_size=len(tokenizer), **special).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = ["--model", str(self.folder), "--port", str(self.port), "--max-rows", "32"]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pyrl", "sampler", *words, "--vllm.kv-cache-gib", "0.25"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, HTTPException):
                time.sleep(0.3)
            finally:
                connection.close()
        self.process.kill()
        raise AssertionError(self.process.communicate()[0][-4000:])

    def stop(self) -> None:
        for process in self.processes():
            process.kill()
        self.process.communicate()

    def processes(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        here = psutil.Process(self.process.pid)
        return [*here.children(recursive=True), here]

    def model(self, seed: int) -> PreTrainedModel:
        """Of its shape, with other weights."""
        model, _ = load_model(str(self.folder))
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.3)
        return model

    def engine(self, model: PreTrainedModel, **options: object) -> ServedEngine:
        shape = model_shape(model.config.get_text_config())
        return ServedEngine(shape, [EOS], VLLMOptions(sampler=(self.url,), **options))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"))
    try:
        made.wait()
        yield made
    finally:
        made.stop()


def grow(driver: Driver) -> None:
    driver.submit([0, 1, 2, 3] * 4, limit=40, retain=True)
    driver.step(4)
    driver.fork(0, 2, 3, exclude=driver.traces[0].tokens[2:3])
    driver.step(1)
    driver.fork(1, 3, 2)
    driver.finish()
    driver.fork(2, 1, 2)  # of one that has ended
    driver.finish()


def test_the_trees_are_those_of_the_embedded_engine(served: Served) -> None:
    """Before and after other weights; what a run left running disturbs no later one."""
    for seed in (1, 2):
        model = served.model(seed)
        engine = served.engine(model)
        probe_T = np.arange(5, 9, dtype=np.int32)
        assert Sync(engine, model, probe_T)(seed)["sync/difference"] < 1e-4
        with urllib.request.urlopen(f"{served.url}/weight_info", timeout=10) as answer:
            assert json.load(answer) == {"weight_version": str(seed)}
        drivers = Driver(engine), Driver(HFEngine(model, [EOS]))
        for driver in drivers:
            grow(driver)
        assert_same(*drivers)
        work, embedded = engine.work(), drivers[1].engine.work()
        assert work.decode_tokens >= embedded.decode_tokens - 5
        assert 0 < work.prompt_tokens < sum(len(t.prompt) for t in drivers[0].traces.values()) * 2
        drivers[0].submit([0, 1, 2], limit=400)  # left running
        drivers[0].step(2)
        engine._samplers._links[0].forget()  # without telling the server


@pytest.mark.parametrize("fault", ["cut", "temperature: expected a number >= 0, got -1.0"])
def test_a_server_is_reached_again(
    served: Served, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After the network has cut it off, and after it has said no."""
    model = served.model(3)
    engine = served.engine(model, step_seconds=5.0)
    engine.load_weights(model.state_dict().items(), 1)
    drivers = Driver(engine), Driver(HFEngine(model, [EOS]))
    for driver in drivers:
        driver.submit([0, 1, 2, 3] * 2, limit=60)
        driver.step(3)
        if driver is drivers[0]:
            link = engine._samplers._links[0]
            if fault == "cut":
                link._connection.sock.close()
            else:
                link._sampling = (-1.0,)
                link.abort(-1)  # something to tell
        driver.finish()
    for branch, trace in drivers[1].traces.items():
        assert drivers[0].traces[branch].tokens == trace.tokens
    assert fault == "cut" or ("with 500: {" in caplog.text and fault in caplog.text)
    assert "samples again" in caplog.text
    engine.close()


def test_an_adapter_trains_over_a_sampler(served: Served, tmp_path: Path) -> None:
    """The sampler's log-probs are those of the learner's adapter, after each of its updates."""
    algorithm = replace(tiny(ttrl(), votes=4), reward=RandomReward())
    run = tiny_run(
        tmp_path,
        algorithm,
        model=str(served.folder),
        engine="vllm",
        vllm=VLLMOptions(sampler=(served.url,)),
        lora=LoRA(rank=4),
        learning_rate=1e-2,
    )
    trainer = make_trainer(run)
    moved = []
    for _ in range(2):
        metrics = stepped(trainer)
        assert metrics["sync/difference"] < 1e-4
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
        halves = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
        moved.append(sum(float(half.detach().abs().sum()) for half in halves))
    trainer.engine.close()
    assert 0 < moved[0] != moved[1]


def test_a_server_that_is_killed_ends_the_run_that_has_no_other(served: Served) -> None:
    """Last: nobody starts it again."""
    model = served.model(4)
    engine = served.engine(model)
    engine.load_weights(model.state_dict().items(), 1)
    driver = Driver(engine)
    driver.submit([0, 1], limit=300)
    driver.step(2)
    for process in served.processes():
        os.kill(process.pid, signal.SIGKILL)
    served.process.wait()
    with pytest.raises(EngineFailure, match=f"no sampler is left: {served.url} does not answer"):
        driver.finish()
    engine.close()
