"""A run's directory: whose it is, and what a resumed run may not change."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_run import tiny, tiny_run

from pyrl.demo.run import ttrl
from pyrl.engine import EngineFailure
from pyrl.forest import Forest
from pyrl.loss import TIS, ClampedLogp, TopEntropy
from pyrl.methods import METHODS
from pyrl.run.directory import SETTINGS, RunError, claim, find_start, keeping_forest
from pyrl.run.names import ConfigError
from pyrl.run.parsing import load_run, parse_run


def test_a_run_resumes_with_the_classes_that_it_began_with(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(ttrl()), resume=True)
    claim(run)
    assert find_start(run) is None
    loss = run.algorithm.loss
    for changed, message in (
        ({"surrogate": ClampedLogp()}, "choices.loss.surrogate (was 'Clipped', is 'ClampedLogp')"),
        ({"behaviour": TIS()}, "choices.loss.behaviour (was None, is 'TIS')"),
        ({"keep": (TopEntropy(),)}, "choices.loss.keep.top_entropy (was None, is 'TopEntropy')"),
    ):
        other = replace(run.algorithm, loss=replace(loss, **changed))
        with pytest.raises(RunError) as error:
            find_start(replace(run, algorithm=other))
        assert message in str(error.value)


def test_the_settings_of_a_run_do_not_say_that_it_was_resumed(tmp_path: Path) -> None:
    """As a --config for another directory they would ask for a checkpoint there."""
    run = tiny_run(tmp_path, METHODS["ttrl"](), resume=True)
    claim(run)
    assert load_run(run.output / SETTINGS, METHODS) == replace(run, resume=False)


def test_any_change_of_the_settings_is_refused_by_a_sentence_or_changes_nothing(
    tmp_path: Path,
) -> None:
    run = tiny_run(tmp_path, tiny(ttrl()), resume=True)
    claim(run)
    path = run.output / SETTINGS
    whole = path.read_bytes()
    dice, refused = random.Random(15), 0
    for _ in range(20):
        at = dice.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([dice.randrange(256)]) + whole[at + 1 :])
        try:
            assert find_start(run) is None
        except RunError:
            refused += 1
    assert refused > 10


def test_settings_without_classes_are_compared_by_their_numbers(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tiny(ttrl()), resume=True)
    claim(run)
    path = run.output / SETTINGS
    content = yaml.safe_load(path.read_text())
    del content["choices"]
    path.write_text(yaml.safe_dump(content))
    assert find_start(run) is None


def test_a_settings_file_of_other_classes_is_refused_with_both_names(tmp_path: Path) -> None:
    method = METHODS["ttrl"]()
    other = replace(method, loss=replace(method.loss, surrogate=ClampedLogp()))
    run = tiny_run(tmp_path, other)
    claim(run)
    path = run.output / SETTINGS
    message = "loss.surrogate: expected Clipped, as the method 'ttrl' has it, got ClampedLogp"
    with pytest.raises(ConfigError, match=message):
        load_run(path, METHODS)
    with pytest.raises(ConfigError, match=message):
        parse_run(["--config", str(path)], "ttrl", method)


def test_trees_that_a_failed_engine_leaves_are_kept_until_a_step_succeeds(tmp_path: Path) -> None:
    forest, path = Forest(), tmp_path / "forest_in_flight"
    forest.add_tree(np.array([1, 2, 3], np.int32))
    with (
        pytest.raises(EngineFailure, match=r"step 7: it died\. What had grown is in .*--resume"),
        keeping_forest(tmp_path, forest, 7),
    ):
        raise EngineFailure("it died")
    assert Forest.load(path.read_bytes()) == forest
    with keeping_forest(tmp_path, forest, 7):
        assert path.exists()
    assert not path.exists()
