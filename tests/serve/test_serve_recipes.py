"""Two recipes of the SDK's cookbook, a supervised one and GRPO, run against the server as they are.

What they would fetch from a hub is made here: a small model with random weights, its tokenizer, and
questions; the renderer is the cookbook's plain one.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from tinker_server import TOKEN, Server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_model(folder: Path) -> str:
    """A model of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: n for n, letter in enumerate(["<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    whole.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 1024, "eos_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **shape, **heads))
    model.save_pretrained(folder)
    return str(folder)


def run(
    recipe: ModuleType, patch: pytest.MonkeyPatch, data: datasets.DatasetDict, **config: Any
) -> list[dict[str, Any]]:
    """Metrics of each step of a recipe."""
    from transformers import AutoTokenizer

    patch.setattr(recipe, "get_tokenizer", AutoTokenizer.from_pretrained)
    patch.setattr(recipe.model_info, "get_recommended_renderer_name", lambda name: "role_colon")
    patch.setattr(recipe.datasets, "load_dataset", lambda *names: data)
    recipe.main(recipe.Config(lora_rank=4, learning_rate=1e-2, **config))
    file = Path(config["log_path"]) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_supervised_recipe_and_grpo_run_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinker_cookbook.recipes import rl_loop, sl_loop

    monkeypatch.setenv("TINKER_API_KEY", TOKEN)
    turn = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2, and no 3"}]
    talks = datasets.DatasetDict(train=datasets.Dataset.from_dict({"messages": [turn] * 12}))
    sums = {"question": ["1 + 1?", "2 + 2?"] * 2, "answer": ["#### 2", "#### 4"] * 2}
    questions = datasets.DatasetDict(train=datasets.Dataset.from_dict(sums))
    with Server(tmp_path / "served", write_model(tmp_path / "model")) as server:
        where = {"base_url": server.url, "model_name": str(tmp_path / "model"), "save_every": 1}
        told = run(
            sl_loop, monkeypatch, talks, batch_size=2, log_path=str(tmp_path / "sl"), **where
        )
        losses = [step["train_mean_nll"] for step in told]
        assert len(losses) == 6
        assert losses[-1] < losses[0] - 0.1
        # A model of random weights is right about nothing: what it is rewarded for is its e's.
        monkeypatch.setattr(rl_loop, "get_reward", lambda text, answer: float(text.count("e")))
        shape = {"batch_size": 2, "group_size": 8, "max_tokens": 24}
        told = run(
            rl_loop,
            monkeypatch,
            questions,
            loss_fn="importance_sampling",
            log_path=str(tmp_path / "rl"),
            **shape,
            **where,
        )
        assert len(told) == 2
    saved = sorted(path.name for path in (tmp_path / "served").glob("*/*/*") if path.is_dir())
    assert saved.count("final") == 4
    assert "000001" in saved
