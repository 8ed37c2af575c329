"""pyrl without its hosts: importing it imports none, and an adapter names what to install."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "pyrl"


def test_only_adapters_import_hosts_and_nothing_imports_adapters() -> None:
    host = re.compile(r"^\s*(?:import|from) (trl|verl|openrlhf|ray)\b", re.M)
    adapter = re.compile(
        r"^\s*(?:import|from) pyrl\.hosts\b(?!\.versions)|^\s*from pyrl import .*\bhosts\b", re.M
    )
    importing: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        text, name = path.read_text("utf-8"), path.relative_to(PACKAGE).as_posix()
        if found := {*host.findall(text)}:
            importing[name] = found
        assert name.startswith("hosts/") or not adapter.search(text), name
    assert importing == {
        "hosts/trl/release.py": {"trl"},
        "hosts/verl.py": {"verl"},
        "hosts/verl_trees.py": {"verl"},
        "hosts/openrlhf.py": {"openrlhf"},
        "hosts/openrlhf_trees.py": {"openrlhf"},
    }


@pytest.mark.parametrize(
    ("module", "host", "releases"),
    [
        ("trl", "trl", ">=1.14,<1.17"),
        ("verl", "verl", ">=0.9,<0.10"),
        ("verl_trees", "verl", ">=0.9,<0.10"),
        ("openrlhf", "openrlhf", ">=0.10.4,<0.12"),
    ],
)
def test_an_adapter_without_its_host_says_which_releases_work(
    module: str, host: str, releases: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("pyrl.hosts.versions.version", version)
    adapters = tuple(f"pyrl.hosts.{host}" for host in ("trl", "verl", "openrlhf"))
    for name in [name for name in sys.modules if name.startswith(adapters)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError) as caught:
        import_module(f"pyrl.hosts.{module}")
    assert str(caught.value) == (
        f"pyrl.hosts.{host}: expected {host} {releases} to be installed, got none "
        f"(pip install '{host}{releases}')"
    )
