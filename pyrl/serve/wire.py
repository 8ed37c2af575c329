"""Wire: the messages of the protocol that travel as protobuf, and NumPy arrays in and out of them.

Only training batches and the results of passes and of sampling do; all else is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from pyrl.serve.body import RequestError

PROTOBUF = "application/x-protobuf"
"""The content type of these messages."""

KINDS = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13}
"""Types of fields by protobuf's numbers; 11 is a message. An enumeration travels as an int32."""

MESSAGES = {
    "Tensor": "dense:1:bytes sparse_csr:2:Sparse dtype:3:int32 shape:4:*int64",
    "Sparse": "values:1:bytes crow_indices:2:bytes col_indices:3:bytes",
    "Text": "tokens:1:bytes",
    "Other": "data:1:bytes",
    "Chunk": "encoded_text:1:Text image:2:Other dmel:3:Other",
    "Datum": "model_input:1:*Chunk loss_fn_inputs:2:%Tensor",
    "Setting": "number:1:double text:2:string",
    "Pass": (
        "model_id:1:string seq_id:2:int32 data:3:*Datum loss_fn:4:string "
        "loss_fn_config:5:%double forward_only:6:bool loss_fn_config_v2:7:%Setting"
    ),
    "Columns": "data:1:bytes offsets:2:bytes dtype:3:int32 trailing_shape:4:*int64",
    "Record": "type_tag:1:string fields:2:%Columns num_datums:3:int64",
    "Passed": "loss_fn_output_type:1:string loss_fn_outputs:2:*Record metrics:3:%double",
    "Top": "token_ids:1:bytes logprobs:2:bytes k:3:uint32 length:4:uint32",
    "Sequence": "stop_reason:1:int32 tokens:2:bytes logprobs:3:bytes topk_sampled_logprobs:4:Top",
    "Alternatives": "tokens:1:Tensor logprobs:2:Tensor",
    "Samples": (
        "sequences:1:*Sequence prompt_logprobs:2:bytes topk_prompt_logprobs:3:Top "
        "prompt_cache_hit_tokens:4:int32 target_prompt_logprobs:5:Tensor "
        "prompt_alt_tokens:6:Alternatives"
    ),
}
"""Fields as name:number:type; a * repeats it, a % maps texts to it. Names of messages are ours, for
they do not travel."""

FLOAT32, INT64 = 1, 2
DTYPES: dict[int, Any] = {FLOAT32: np.dtype(np.float32), INT64: np.dtype(np.int64)}
"""What a tensor holds, by its number."""


@dataclass(frozen=True)
class Datum:
    """A text to learn from: its input tokens, and the columns of its loss by name."""

    token_I: NDArray[np.int64]
    inputs: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Pass:
    """A request to read a batch, and to add its gradient unless it is `forward_only`."""

    model_id: str
    seq_id: int
    loss: str
    config: Mapping[str, float]
    forward_only: bool
    data: Sequence[Datum]


@dataclass(frozen=True)
class Top:
    """The k most probable tokens at each of some places: ids and log-probs [L, k]."""

    token_LK: NDArray[np.int32]
    logprob_LK: NDArray[np.float32]


def read_pass(body: bytes) -> Pass:
    """RequestError for what is no such message, or holds what no text is made of."""
    message = _TYPES["Pass"]()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise RequestError(f"body: expected a forward_backward message: {error}") from error
    config = dict(message.loss_fn_config)
    for name, setting in message.loss_fn_config_v2.items():
        if setting.text:
            raise RequestError(
                f"loss_fn_config.{name}: expected a number, got the text {setting.text!r}"
            )
        config[name] = setting.number
    data = [_datum(n, datum) for n, datum in enumerate(message.data)]
    if not data:
        raise RequestError("data: expected at least one datum, got none")
    head = (message.model_id, message.seq_id, message.loss_fn)
    return Pass(*head, config, message.forward_only, data)


def passed(logprob_N: Sequence[NDArray[np.float32]], metrics: Mapping[str, float]) -> bytes:
    """The result of a pass: the log-probs of each datum's targets."""
    end_N = np.cumsum([0, *(4 * len(logprob_T) for logprob_T in logprob_N)], dtype=np.int64)
    data = np.concatenate(logprob_N).astype(np.float32).tobytes()
    record = _TYPES["Record"](type_tag="ArrayRecord", num_datums=len(logprob_N))
    columns = _TYPES["Columns"](data=data, offsets=end_N.tobytes(), dtype=FLOAT32)
    record.fields["logprobs"].MergeFrom(columns)
    message = _TYPES["Passed"](loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record])
    message.metrics.update(metrics)
    return bytes(message.SerializeToString())


def sequence(
    tokens: Sequence[int], logprobs: Sequence[float], *, stopped: bool, top: Top | None
) -> Any:
    """One sample of a result."""
    message = _TYPES["Sequence"](
        stop_reason=0 if stopped else 1,
        tokens=np.array(tokens, np.int32).tobytes(),
        logprobs=np.array(logprobs, np.float32).tobytes(),
    )
    if top is not None:
        message.topk_sampled_logprobs.MergeFrom(_top(top))
    return message


def samples(
    sequences: Sequence[Any],
    prompt_logprob_L: NDArray[np.float32] | None,
    top: Top | None,
    alternatives: Top | None,
) -> bytes:
    """The result of sampling; without a log-prob a token of the prompt has NaN."""
    message = _TYPES["Samples"](sequences=sequences)
    if prompt_logprob_L is not None:
        message.prompt_logprobs = prompt_logprob_L.astype(np.float32).tobytes()
    if top is not None:
        message.topk_prompt_logprobs.MergeFrom(_top(top))
    if alternatives is not None:
        drawn = message.prompt_alt_tokens
        drawn.tokens.MergeFrom(_tensor(alternatives.token_LK.astype(np.int64), INT64))
        drawn.logprobs.MergeFrom(_tensor(alternatives.logprob_LK, FLOAT32))
    return bytes(message.SerializeToString())


def _datum(n: int, message: Any) -> Datum:
    tokens = []
    for chunk in message.model_input:
        if not chunk.HasField("encoded_text"):
            raise RequestError(f"data[{n}].model_input: expected chunks of text tokens alone")
        tokens.append(_array(f"data[{n}].model_input", chunk.encoded_text.tokens, np.int32))
    inputs = {}
    for name, tensor in message.loss_fn_inputs.items():
        where = f"data[{n}].loss_fn_inputs.{name}"
        if tensor.HasField("sparse_csr") or len(tensor.shape) > 1:
            raise RequestError(f"{where}: expected one number for each token, a dense tensor [T]")
        if tensor.dtype not in DTYPES:
            raise RequestError(f"{where}: expected float32 or int64, got type {tensor.dtype}")
        inputs[name] = _array(where, tensor.dense, DTYPES[tensor.dtype])
    token_I = np.concatenate(tokens) if tokens else np.empty(0)
    return Datum(token_I.astype(np.int64), inputs)


def _array(where: str, data: bytes, dtype: Any) -> NDArray[Any]:
    size = np.dtype(dtype).itemsize
    if len(data) % size:
        raise RequestError(f"{where}: expected numbers of {size} bytes, got {len(data)} bytes")
    return np.frombuffer(data, dtype)


def _top(top: Top) -> Any:
    length, k = top.token_LK.shape
    ids = top.token_LK.astype(np.int32).tobytes()
    logprobs = top.logprob_LK.astype(np.float32).tobytes()
    return _TYPES["Top"](token_ids=ids, logprobs=logprobs, k=k, length=length)


def _tensor(value: NDArray[Any], dtype: int) -> Any:
    data = value.astype(DTYPES[dtype]).tobytes()
    return _TYPES["Tensor"](dense=data, dtype=dtype, shape=value.shape)


def _described() -> descriptor_pb2.FileDescriptorProto:
    """The table above as protobuf describes a file."""
    file = descriptor_pb2.FileDescriptorProto(
        name="pyrl/serve/wire.proto", package="pyrl.serve", syntax="proto3"
    )
    for name, text in MESSAGES.items():
        message = file.message_type.add(name=name)
        for line in text.split():
            field, number, kind = line.split(":")
            label = 3 if kind[0] in "*%" else 1
            if kind[0] == "%":
                entry = message.nested_type.add(name=f"{field.title().replace('_', '')}Entry")
                entry.options.map_entry = True
                _field(entry, "key", 1, "string", 1)
                _field(entry, "value", 2, kind[1:], 1)
                kind = f"{name}.{entry.name}"
            _field(message, field, int(number), kind.lstrip("*"), label)
    return file


def _field(message: Any, name: str, number: int, kind: str, label: int) -> None:
    field = message.field.add(name=name, number=number, label=label, type=KINDS.get(kind, 11))
    if kind not in KINDS:
        field.type_name = f".pyrl.serve.{kind}"


def _types() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_described())
    found = {name: pool.FindMessageTypeByName(f"pyrl.serve.{name}") for name in MESSAGES}
    return {name: message_factory.GetMessageClass(kind) for name, kind in found.items()}


_TYPES = _types()
