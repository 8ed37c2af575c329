"""An engine in a process of its own: it may die, hang or lie, and no leaf is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from driven_engine import Driver
from small_llama import Small, small_llama

from pyrl.engine import RUNNING, EngineFailure


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    folder = tmp_path_factory.mktemp("own")
    made = Small(small_llama(), folder, own_process=True, step_seconds=8.0, restarts=1)
    made.engine.load_weights(small_llama(seed=1).state_dict().items(), 3)
    made.model = small_llama(seed=1)
    yield made
    made.engine.close()


def children() -> list[psutil.Process]:
    """The processes of vLLM, not those that Python itself keeps."""
    found = psutil.Process().children(recursive=True)
    alive = [p for p in found if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in alive if "resource_tracker" not in " ".join(p.cmdline())]


@pytest.mark.parametrize("fault", [None, signal.SIGKILL, signal.SIGSTOP])
def test_branches_go_on_where_they_were(own: Small, fault: signal.Signals | None) -> None:
    """Without a fault, with a process that dies, and with one that hangs."""
    drivers = own.drivers()
    for driver in drivers:
        driver.submit([0, 1, 2, 3] * 4, limit=40, retain=True)
        driver.step(5)
        driver.fork(0, 2, 3, exclude=driver.traces[0].tokens[2:3])
        driver.step(2)
        driver.fork(1, 3, 2, exclude=driver.traces[1].tokens[3:4])  # no token before the fault
        if fault and driver is drivers[0]:
            for process in children():
                os.kill(process.pid, fault)
        driver.finish()
    ours, reference = drivers
    for branch, trace in reference.traces.items():
        assert ours.traces[branch].tokens == trace.tokens
    assert own.engine.weight_version() == 3
    own.clear(ours)


def test_a_branch_that_is_ended_has_no_token_more_and_still_forks(own: Small) -> None:
    """The process has drawn on meanwhile; those tokens are dropped."""
    drivers, seed = own.drivers(), own.long_seed(0, 30)
    for driver in drivers:
        driver.submit([0], limit=30, seed_B=[seed], retain=True)
        driver.submit([0, 1], limit=30, seed_B=[seed, 2])
        driver.step(5)
        driver.engine.finish(np.array([0, 1]))
        with pytest.raises(ValueError, match="branch 1 is unknown"):
            driver.abort(1)
        had = [len(driver.traces[branch].tokens) for branch in (0, 1)]
        driver.fork(0, 2, 2)
        driver.finish()
        assert [len(driver.traces[branch].tokens) for branch in (0, 1)] == had
    ours, reference = drivers
    assert len(reference.traces) == 5
    for branch in (2, 3, 4):  # the others had a token more or less when they were ended
        assert ours.traces[branch].tokens == reference.traces[branch].tokens
    own.clear(ours)


def test_an_engine_that_fails_again_and_again_ends_the_run(own: Small) -> None:
    driver = Driver(own.engine)
    own.engine._launch = _dead  # type: ignore[method-assign]
    for process in children():
        process.kill()
    driver.submit([0], limit=60)  # to nobody: that shows in the next step
    with pytest.raises(EngineFailure, match=r"never started \(restarts in a row: 1\)"):
        driver.finish()
    own.clear(driver)  # what is left can be forgotten, though there is nobody to tell
    del own.engine._launch
    own.engine._core = own.engine._launch()
    own.engine.load_weights(own.model.state_dict().items(), 4)
    again = Driver(own.engine)
    again.submit([0], limit=4)
    again.finish()
    assert len(again.traces[0].tokens) >= 1


def _dead() -> None:
    raise EngineFailure("never started")


def test_weights_after_aborted_branches_need_no_new_engine(own: Small) -> None:
    """The process has drawn on with the older ones; nobody wants those tokens."""
    core, version = own.engine._core, own.engine.weight_version()
    drivers = own.drivers()
    for driver in drivers:
        driver.submit([0, 1, 2, 3] * 4, limit=60)
        driver.step(5)
        driver.abort(*[b for b, trace in driver.traces.items() if trace.finish == RUNNING])
        driver.engine.load_weights(
            own.model.state_dict().items() if driver is drivers[0] else None, version + 1
        )
        driver.submit([0, 1, 2, 3], limit=20)
        driver.finish()
    assert own.engine._core is core
    ours, reference = drivers
    for branch in range(16, 20):
        assert ours.traces[branch].tokens == reference.traces[branch].tokens


def test_ctrl_c_is_the_owners_business(own: Small) -> None:
    """A terminal sends it to every process."""
    core = own.engine._core
    driver = Driver(own.engine)
    driver.submit([0, 1], limit=40)
    driver.step(2)
    for process in children():
        process.send_signal(signal.SIGINT)
    driver.finish()
    assert own.engine._core is core
    own.clear(driver)


OWNER = """
import sys, time
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.options import VLLMOptions
if __name__ == "__main__":
    options = VLLMOptions(own_process=True, kv_cache_gib=0.25)
    engine = VLLMEngine(sys.argv[1], [2], max_rows=4, options=options)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_engine_ends_with_its_owner(own: Small, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    before = set(memory_files())
    with subprocess.Popen(
        [sys.executable, script, own.folder], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        engines = psutil.Process(owner.pid).children(recursive=True)
        assert engines
        assert set(memory_files()) == before  # unlinked as soon as they are mapped
        owner.kill()
        owner.wait()
    _, alive = psutil.wait_procs(engines, timeout=20)
    assert not alive


def memory_files() -> list[Path]:
    return list(Path("/dev/shm").glob("pyrl-*"))


def test_a_closed_engine_leaves_nothing_behind(tmp_path: Path) -> None:
    before, files = {p.pid for p in children()}, set(memory_files())
    made = Small(small_llama(), tmp_path, own_process=True)
    made.engine.load_weights(made.model.state_dict().items(), 1)
    assert set(memory_files()) == files
    assert {p.pid for p in children()} > before
    driver = Driver(made.engine)
    driver.submit([0], limit=50)
    made.engine.close()
    deadline = time.monotonic() + 20
    while {p.pid for p in children()} != before:
        assert time.monotonic() < deadline, children()
        time.sleep(0.1)
