"""What a run asks for and the protocol lacks is refused by name, before a server is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyrl.engine import EngineError
from pyrl.remote.engine import statistics
from pyrl.remote.needs import check_remote
from pyrl.remote.options import RemoteOptions
from pyrl.remote.service import check_answers
from pyrl.run.parsing import settings
from pyrl.train import Trainer

NOBODY = "http://127.0.0.1:9"
RANK = {"lora.rank": 4}


def asked(method: str, **values: Any) -> dict[str, Any]:
    return {"model": "demo", "data": "demo:train", "tinker": NOBODY, **RANK, **values}


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("grpo", {"lora.rank": None}, "lora.rank: expected a rank"),
        ("grpo", {"lora.alpha": 3.0}, "which the server chooses, got 3.0"),
        ("grpo", {"lora.merge": True}, "lora.merge: expected False"),
        ("grpo", {"engine": "vllm"}, "engine: expected 'hf', got 'vllm'"),
        ("grpo", {"optimizer": "n_harpg"}, "optimizer: expected 'adamw', got 'n_harpg'"),
        ("grpo", {"sample.min_p": 0.1}, "sample.min_p: expected 0"),
        ("grpo", {"diagnostics": ["attention_entropy"]}, "got attention_entropy"),
        ("ttrl", {}, r"sample.temperature: expected 1 .*, got 0.6"),
        ("grpo_unique", {}, "fork: .*got WithoutReplacement, which needs the whole distribution"),
        ("epo", {}, "loss.entropy: expected 0, got 0.001, which needs the gradient"),
        ("lp_reg", {}, "needs the column proxy_logprob_T, which needs the whole distribution"),
        ("siren", {}, "needs the column nucleus_entropy_T, which"),
    ],
)
def test_what_the_protocol_lacks_is_refused_by_name(
    method: str, values: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = settings(method, output=str(tmp_path / "run"), **asked(method, **values))
    with pytest.raises(ValueError, match=f"^{method}: --tinker: .*{said}"):
        Trainer(run)


@pytest.mark.parametrize("method", ["grpo", "dapo", "cispo", "gspo", "ctpo", "calibrl", "hapo"])
def test_other_methods_are_not(method: str) -> None:
    check_remote(settings(method, **asked(method)))


def test_nobody_at_an_address_is_one_sentence() -> None:
    with pytest.raises(EngineError, match=f"^--tinker: {NOBODY}: no server answers"):
        check_answers(NOBODY)
    with pytest.raises(EngineError, match="begins with http, got 'localhost:8000'"):
        check_answers("localhost:8000")


def test_options_of_a_server_are_checked() -> None:
    with pytest.raises(ValueError, match=r"remote\.chunk: expected at least 1, got 0"):
        RemoteOptions(chunk=0)
    with pytest.raises(ValueError, match=r"remote\.top: expected at least 5, got 4"):
        RemoteOptions(top=4)
    with pytest.raises(ValueError, match=r"remote\.timeout: expected > 0, got 0"):
        RemoteOptions(timeout=0)


@pytest.mark.parametrize("kept", [5, 20, 64])
def test_entropy_of_top_tokens_is_a_bound_from_below_and_as_close_as_said(kept: int) -> None:
    random = np.random.default_rng(kept)
    vocabulary = 64
    logit_TV = random.normal(scale=random.uniform(0, 4, (50, 1)), size=(50, vocabulary))
    log_TV = logit_TV - np.log(np.exp(logit_TV).sum(axis=1, keepdims=True))
    sorted_TV = np.sort(log_TV, axis=1)[:, ::-1]
    true_T = -(np.exp(log_TV) * log_TV).sum(axis=1)
    entropy_T, confidence_T = statistics(random.permuted(sorted_TV[:, :kept], axis=1), vocabulary)
    assert confidence_T == pytest.approx(np.exp(sorted_TV[:, :5]).sum(axis=1))
    missing_T = true_T - entropy_T
    assert (missing_T > -1e-9).all()
    if kept == vocabulary:
        assert missing_T == pytest.approx(0, abs=1e-9)
        return
    rest_T = 1 - np.exp(sorted_TV[:, :kept]).sum(axis=1)
    least_T = np.minimum(rest_T, np.exp(sorted_TV[:, kept - 1]))
    assert (missing_T <= rest_T * np.log((vocabulary - kept) * least_T / rest_T) + 1e-9).all()
    assert missing_T.max() > 1e-3
