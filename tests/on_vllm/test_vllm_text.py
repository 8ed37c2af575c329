"""Text on vLLM: characters of several tokens, and texts that end a response."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from driven_engine import SHAPE, Driver, Trace
from small_llama import HEADS, assert_same
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pyrl.answers.reading import StopText, decoder, end_tokens
from pyrl.engine import STOPPED, Branches
from pyrl.engine.hf import HFEngine
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.options import VLLMOptions
from pyrl.fork import Flat, Fork, TopEntropy
from pyrl.leaves import collect
from pyrl.logits.sampling import Sampling
from pyrl.prune import Keep
from pyrl.rollout import Rollout

END = 256
EURO = "€"
FOLLOWS = {0xE2: [0x82], 0x82: [0xAC], 0xAC: [0xE2, 0x61, 0x0A, END], 0x61: [0xE2, 0x61, 0x0A]}
"""Bytes that the model writes after a byte: euros of three bytes, letters, line breaks, the end."""
Both = tuple[VLLMEngine, HFEngine]


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, whose id is the byte, and one for the end."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_byte = {ord(c): c for c in symbols if ord(c) < 256}
    others = iter(c for c in symbols if ord(c) >= 256)
    vocab = {of_byte.get(byte) or next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def bigrams() -> PreTrainedModel:
    """A Llama whose layers add nothing: the next byte is up to the last one, as FOLLOWS says."""
    torch.manual_seed(0)
    config = SHAPE | HEADS | {"vocab_size": END + 1, "eos_token_id": END}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.functional.normalize(torch.randn(END + 1, 64), dim=1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.zero_()
        for last, following in FOLLOWS.items():
            model.lm_head.weight[following] += 1.5 * embedding[last]
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def engines(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    """vLLM and the reference, which end a response with a line break too."""
    folder: Path = tmp_path_factory.mktemp("bytes")
    model = bigrams()
    model.save_pretrained(folder)
    stop = end_tokens(model, tokenizer) | StopText("\n", tokenizer).alone
    assert stop == {ord("\n"), END}
    options = VLLMOptions(kv_cache_gib=0.25)
    vllm = VLLMEngine(str(folder), stop, max_rows=64, options=options)
    yield vllm, HFEngine(model, stop)
    vllm.close()


def test_the_tokenizer_has_a_token_for_each_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"a{EURO}\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())


@pytest.mark.parametrize("fork", [Flat(), TopEntropy()], ids=repr)
def test_a_text_of_several_tokens_ends_a_response_as_on_the_reference(
    engines: Both, tokenizer: PreTrainedTokenizerFast, fork: Fork
) -> None:
    stop = StopText(f"{EURO}{EURO}", tokenizer)
    assert not stop.alone
    grown = []
    for engine in engines:
        forest = Rollout(
            engine,
            [ids(EURO), ids("a")],
            votes=24,
            limit=40,
            sampling=Sampling(temperature=0.7),
            fork=fork,
            prune=Keep(),
            signals=None,
            seed=5,
            stop=stop,
        ).run()
        leaves = collect(forest, decoder(tokenizer))
        grown.append(sorted(zip(leaves.text_N, leaves.finish_N.tolist(), strict=True)))
        engine.load_weights(bigrams().state_dict().items(), 0)  # refused if it knew a branch
    ours, reference = grown
    assert ours == reference
    ended = [how for text, how in ours if text.endswith(stop.text)]
    assert len(ended) >= 5
    assert set(ended) == {STOPPED}
    assert not any(stop.text in text[:-1] for text, _ in ours)


def test_trees_of_texts_are_read_as_their_bytes(
    engines: Both, tokenizer: PreTrainedTokenizerFast
) -> None:
    grown = []
    for engine in engines:
        forest = Rollout(
            engine,
            [ids(EURO), ids("a")],
            votes=24,
            limit=40,
            sampling=Sampling(temperature=0.7),
            fork=TopEntropy(),
            prune=Keep(),
            signals=None,
            seed=5,
        ).run()
        leaves = collect(forest, decoder(tokenizer))
        paths = [forest.path(leaf).tokens for leaf in leaves.leaf_N.tolist()]
        texts = zip((path.tolist() for path in paths), leaves.text_N, strict=True)
        grown.append(sorted(texts))
        stopped = [path for path, how in zip(paths, leaves.finish_N, strict=True) if how == STOPPED]
        assert {int(path[-1]) for path in stopped} == {ord("\n"), END}
    ours, reference = grown
    assert ours == reference
    for path, text in ours:
        written = bytes(token for token in path if token != END)
        assert text == written.decode("utf-8", "replace")
        assert "\n" not in text[:-1]
    assert sum(EURO in text for _, text in ours) >= 10


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_fork_inside_a_character_goes_on_with_its_bytes(
    engines: Both, tokenizer: PreTrainedTokenizerFast, keep: int
) -> None:
    drivers = [Driver(engine, 0.1) for engine in engines]
    for driver in drivers:
        one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
        driver.engine.submit(Branches([ids(EURO)], zero, zero, zero.astype(np.uint64), 12 * one))
        driver.traces[0] = Trace(ids(EURO))
        driver.step(4)
        driver.fork(0, keep, 8)
        driver.finish()
    assert_same(*drivers)
    for branch, trace in drivers[0].traces.items():
        if trace.finish == STOPPED:
            text = decoder(tokenizer)([np.array(trace.tokens)])[0]
            assert "\ufffd" not in text, branch
