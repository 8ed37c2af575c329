from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyrl
from pyrl.answers.pool import Outcome, Status, VerifierError, VerifierPool

VERIFIERS = """
import os, signal, subprocess, time

def length(text): return len(text)
def process(): return os.getpid()
def sleep(seconds): time.sleep(float(seconds)); return seconds
def spin():
    while True: pass
def raises(text): raise KeyError(text)
def recurse(): return recurse()
def dies(): os._exit(3)
def killed(): os.kill(os.getpid(), signal.SIGSEGV)
def hoard(): return len(bytearray(8 << 30))
def grow():
    hoard = []
    while True: hoard.append(bytearray(1 << 20))
def chatter(): print("{}" * 100000, flush=True); return "said"
def unsayable(): return object()
def child_then_hang():
    pid = subprocess.Popen(["sleep", "60"]).pid
    open(os.environ["CHILD_FILE"], "w").write(str(pid))
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verifiers") / "verifiers.py"
    path.write_text(VERIFIERS)
    return path


@pytest.fixture
def pool(source: Path) -> Iterator[VerifierPool]:
    with VerifierPool(source, workers=2, timeout_s=10, memory_mb=256) as pool:
        yield pool


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_results_come_back_in_the_order_of_the_calls(pool: VerifierPool) -> None:
    outcomes = pool.map("sleep", [("0.2",), ("0.0",), ("0.1",), ("0.05",)])
    assert [outcome.value for outcome in outcomes] == ["0.2", "0.0", "0.1", "0.05"]
    assert pool.calls == 4
    assert pool.replaced == 0


def test_a_worker_is_used_again(source: Path) -> None:
    with VerifierPool(source, workers=1) as pool:
        first, second = pool.map("process", [(), ()])
    assert first.value == second.value
    assert first.value != os.getpid()


def test_a_call_that_hangs_is_killed_at_its_time_limit_and_its_worker_replaced(
    source: Path,
) -> None:
    with VerifierPool(source, workers=1, timeout_s=0.3) as pool:
        before = pool.submit("process").result().value
        begin = time.monotonic()
        outcome = pool.submit("spin").result()
        assert time.monotonic() - begin < 3
        assert outcome == Outcome(Status.TIMEOUT, reason="no result within 0.3 s")
        after = pool.submit("process").result().value
        assert after != before
        assert not alive(before)
        assert pool.replaced == 1


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("raises", ("why",), "KeyError: 'why'"),
        ("recurse", (), "RecursionError"),
        ("dies", (), "exit status 3"),
        ("killed", (), "killed by SIGSEGV"),
        ("hoard", (), "MemoryError"),
        ("grow", (), "MemoryError"),
        ("unsayable", (), "TypeError"),
        ("no_such_function", (), "KeyError: 'no_such_function'"),
    ],
)
def test_a_crash_is_an_outcome_with_a_reason_and_the_pool_goes_on(
    source: Path, function: str, arguments: tuple[str, ...], reason: str
) -> None:
    with VerifierPool(source, workers=1, timeout_s=20, memory_mb=256) as pool:
        outcome = pool.submit(function, *arguments).result()
        assert outcome.status is Status.CRASHED
        assert outcome.value is None
        assert reason in outcome.reason
        assert pool.submit("length", "four").result() == Outcome(Status.DONE, 4)
        assert pool.replaced == 1


def test_what_a_verifier_prints_does_not_mix_with_results(pool: VerifierPool) -> None:
    assert pool.submit("chatter").result() == Outcome(Status.DONE, "said")


def test_arguments_of_any_size_and_content_arrive(pool: VerifierPool) -> None:
    texts = ["", "\0\n\u2028é\ud800", "x" * 3_000_000]
    outcomes = pool.map("length", [(text,) for text in texts])
    assert [outcome.value for outcome in outcomes] == [0, 5, 3_000_000]


def test_many_threads_share_one_pool(pool: VerifierPool) -> None:
    found: dict[int, list[object]] = {}

    def ask(thread: int) -> None:
        calls = [("x" * (thread + i),) for i in range(20)]
        found[thread] = [outcome.value for outcome in pool.map("length", calls)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: list(range(n, n + 20)) for n in range(6)}
    assert pool.calls == 120


def test_nothing_starts_before_the_first_call(source: Path) -> None:
    before = threading.active_count()
    with VerifierPool(source, workers=4) as pool:
        assert threading.active_count() == before
        assert pool.calls == 0


def test_close_ends_all_processes_and_further_calls_are_errors(source: Path) -> None:
    pool = VerifierPool(source, workers=2)
    processes = {outcome.value for outcome in pool.map("process", [()] * 4)}
    pool.close()
    pool.close()
    assert not any(alive(process) for process in processes)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit("process")


def test_a_pool_that_is_dropped_leaves_no_process(source: Path) -> None:
    pool = VerifierPool(source, workers=1)
    process = pool.submit("process").result().value
    del pool
    gc.collect()
    assert eventually(lambda: not alive(process))


def test_what_a_hanging_verifier_started_is_killed_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_file = tmp_path / "child"
    monkeypatch.setenv("CHILD_FILE", str(child_file))
    with VerifierPool(source, workers=1, timeout_s=1) as pool:
        assert pool.submit("child_then_hang").result().status is Status.TIMEOUT
    assert eventually(lambda: not alive(int(child_file.read_text())))


@pytest.mark.parametrize("text", ["import no_such_module", "def broken(:", "raise SystemExit(7)"])
def test_a_source_that_does_not_load_is_an_error_with_its_reason(tmp_path: Path, text: str) -> None:
    path = tmp_path / "verifiers.py"
    path.write_text(text)
    with (
        VerifierPool(path) as pool,
        pytest.raises(VerifierError, match=r"no_such_module|SyntaxError|exit status 7"),
    ):
        pool.submit("length", "x").result()


def test_settings_out_of_range_are_errors(source: Path, tmp_path: Path) -> None:
    for settings, message in [
        ({"workers": 0}, "workers: expected >= 1, got 0"),
        ({"timeout_s": 0}, "timeout_s: expected > 0, got 0"),
        ({"memory_mb": 8}, "memory_mb: expected >= 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            VerifierPool(source, **settings)
    with pytest.raises(ValueError, match="source: expected a Python file"):
        VerifierPool(tmp_path / "missing.py")


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
print("started")
from pyrl.answers.pool import VerifierPool
pool = VerifierPool(Path({source!r}), workers=1, timeout_s={timeout_s})
print(pool.submit("length", "four").result().value)
print(pool.submit("process").result().value, flush=True)
{rest}
"""


def run_script(source: Path, tmp_path: Path, rest: str) -> subprocess.Popen[str]:
    root = str(Path(pyrl.__file__).parents[1])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=root, source=str(source), timeout_s=1, rest=rest))
    command = [sys.executable, "-X", "dev", "-W", "error", str(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_script_without_a_main_guard_runs_once_and_leaves_nothing_behind(
    source: Path, tmp_path: Path
) -> None:
    out, err = run_script(source, tmp_path, "").communicate(timeout=60)
    first, length, process = out.splitlines()
    assert (first, length, err) == ("started", "4", "")
    assert eventually(lambda: not alive(int(process)))


def test_a_busy_worker_outlives_a_killed_parent_only_for_its_time_limit(
    source: Path, tmp_path: Path
) -> None:
    rest = "pool.submit('spin'); import os, time; time.sleep(0.3); os.kill(os.getpid(), 9)"
    out, _ = run_script(source, tmp_path, rest).communicate(timeout=60)
    process = int(out.splitlines()[-1])
    deadline = time.monotonic() + 20
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process)
