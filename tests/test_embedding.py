"""docs/embedding.md: its loop learns, in so many lines, and every name of its table is there."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyrl.answers.reading import decoder
from pyrl.engine.hf import HFEngine
from pyrl.fork import Flat
from pyrl.leaves import collect
from pyrl.logits.sampling import Sampling
from pyrl.models import load_model
from pyrl.pack import pack_given
from pyrl.prune import Keep
from pyrl.rollout import Rollout

PAGE = (Path(__file__).parents[1] / "docs/embedding.md").read_text("utf-8")


def test_the_loop_of_the_page_learns() -> None:
    torch.set_num_threads(1)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len([line for line in block.splitlines() if line]) <= 40
    assert "_core" not in PAGE
    made: dict[str, Any] = {}
    exec(compile(block, "docs/embedding.md", "exec"), made)
    curve = made["curve"]
    assert np.mean(curve[-4:]) > np.mean(curve[:2]) + 0.05
    assert made["engine"].weight_version() == 12


def test_every_name_of_the_table_is_public_and_says_what_it_is() -> None:
    names = set(re.findall(r"`(pyrl\.[\w.]+)", PAGE))
    assert len(names) > 15
    for name in names:
        assert "._" not in name
        found = pkgutil.resolve_name(name)
        # What is compiled is documented in its stubs.
        compiled = not isinstance(found, dict) and found.__module__.startswith("pyrl._core")
        assert isinstance(found, dict) or found.__doc__ or compiled, name


def test_rows_of_any_origin_have_a_number_for_each_token() -> None:
    prompts, responses = [np.array([1, 2], np.int32)], [np.array([3, 4, 5])]
    read_only = pack_given(prompts, responses)
    assert not read_only.mask_T.any()
    batch = pack_given(prompts, responses, advantage_T=np.arange(3.0), logprob_T=-np.ones(3, "f4"))
    assert batch.mask_T.all()
    assert batch.advantage_T.tolist() == [0, 1, 2]
    assert batch.input_I.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"logprob_T: expected a number .* of 3 .*, got \[2\]"):
        pack_given(prompts, responses, logprob_T=np.zeros(2, np.float32))


def test_an_optimizers_step_is_seen_without_a_call() -> None:
    model, tokenizer = load_model("demo")
    asked = [np.array(tokenizer("31=")["input_ids"], np.int32)]

    def grown(engine: HFEngine) -> list[float]:
        rules: dict[str, Any] = {"fork": Flat(), "prune": Keep(), "signals": None}
        rollout = Rollout(engine, asked, votes=4, limit=6, sampling=Sampling(), seed=1, **rules)
        return collect(rollout.run(), decoder(tokenizer)).rows.logprob_T.tolist()

    engine = HFEngine(model, [])
    before = grown(engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.from_numpy(asked[0])[None].long()).logits.square().mean().backward()
    optimizer.step()
    assert grown(engine) == grown(HFEngine(model, [])) != before
