"""What a model is tried for when it is loaded: right numbers, or a refusal that names its class."""

import re
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES, tiny
from transformers import PreTrainedModel

from pyrl.engine import trial
from pyrl.engine.hf import HFEngine
from pyrl.engine.trial import check_learning, check_sampling
from pyrl.models import ModelError, Room

RIGHT = (
    *("llama", "qwen3_moe", "gemma3_text", "phi3:longrope", "deepseek_v3", "opt", "gpt_bigcode"),
    *("starcoder2", "mistral:window", "mixtral:jitter"),
)
WRONG = {
    "stablelm": "does not keep the texts of a batch apart",
    "nemotron": "does not keep the texts of a batch apart",
    "bart": "does not keep the texts of a batch apart",
    "mamba2": "layers with a state that runs along a text",
    "jamba": "layers with a state that runs along a text",
    "falcon_h1": "layers with a state that runs along a text",
    "zamba": "layers with a state that runs along a text",
    "modernbert-decoder": "Linear.forward() got an unexpected keyword argument 'input_ids'",
    "gemma2": "attention with softcap is not supported",
    "gpt_oss": "attention with sinks is not supported",
    "cohere": "changes its hidden states or its logits (soft-capping, scaling)",
    "falcon:alibi": "expected a model that calls transformers' AttentionInterface",
}


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_that_is_right_is_taken_and_draws_no_random_number(family: str) -> None:
    model, before = tiny(family).train(), torch.get_rng_state()
    check_sampling(model)
    check_learning(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


@pytest.mark.parametrize("family", WRONG)
def test_a_family_that_would_be_wrong_is_refused_by_the_name_of_its_class(family: str) -> None:
    model = tiny(family)
    said = f"{type(model).__name__} cannot be sampled from or trained: "
    with pytest.raises(ModelError, match=f"{re.escape(said)}.*{re.escape(WRONG[family])}"):
        HFEngine(model, [2])


@pytest.mark.parametrize("family", ["stablelm", "nemotron", "bart", "jamba"])
def test_the_learner_alone_refuses_too(family: str) -> None:
    model = tiny(family)
    with pytest.raises(ModelError, match=f"{type(model).__name__} cannot be sampled from or"):
        check_learning(model)


@pytest.mark.parametrize("family", ["phi3:longrope", "llama:dynamic"])
def test_positions_that_the_longest_text_rescales_for_all_are_seen(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the room that keeps them right: a text at the last position changes another one."""
    check_learning(tiny(family))
    monkeypatch.setattr(trial, "room", lambda model: Room(256, "too far"))
    with pytest.raises(ModelError, match="in a packed row, its logits differ"):
        check_learning(tiny(family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_refuse_and_a_neighbour_is(dtype: torch.dtype) -> None:
    check_sampling(tiny("llama", dtype))
    with pytest.raises(ModelError, match="does not keep the texts of a batch apart"):
        check_sampling(tiny("stablelm", dtype))


def test_a_model_whose_logits_are_all_equal_is_taken() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    check_learning(model)


def test_a_room_below_the_trial_is_refused() -> None:
    model: PreTrainedModel = tiny("mistral:window")
    model.config.max_position_embeddings = 4
    with pytest.raises(ModelError, match=r"expected room for 5 tokens .* the model's 4 positions"):
        check_sampling(model)


def test_the_page_has_each_family_that_its_script_tries_and_none_that_is_wrong() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ", page, re.M)
    assert [row for row in rows if row not in ("family", "---")] == sorted(FAMILIES)
    assert "WRONG" not in page
