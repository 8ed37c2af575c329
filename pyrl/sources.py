"""Sources of questions: files, hub data sets, reasoning_gym tasks, the packaged ones; as rows."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

DEMO_QUESTIONS: dict[str, Path] = {
    name: Path(__file__).parent / "demo" / f"{name}.jsonl"
    for name in ("train", "heldout", "length18")
}
"""Packaged question files: 15 to 17 digits to learn from, others of 15 to 17, and 18 digits."""

SHOTS = 6
"""Worked examples before each reasoning_gym question unless `shots` says otherwise: a small model
that is asked without them rarely answers in a form that can be read."""
SHOTS_SEED = 2**31
"""reasoning_gym draws item i from seed + i; worked examples come from far away of any data set."""


class DataError(ValueError):
    """Questions that cannot be used; the message names the file and the line, or the row."""


@dataclass(frozen=True)
class Row:
    """One record of a source before it is tokenized."""

    where: str
    """For messages: file and line, or data set and row."""
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A reasoning_gym task whose own scorer says which answers are right."""

    name: str
    options: str
    """As JSON."""


@dataclass(frozen=True)
class Source:
    """An opened source."""

    rows: Iterable[Row]
    prefix: str = ""
    """Worked examples that come before each question."""
    extractor: str = "boxed"
    """How answers to these questions are read, unless a run says otherwise."""
    stop: str = ""
    """Text that ends a response, unless a run says otherwise."""
    task: Task | None = None
    """Who says which answers are right; None: they are compared with the answers of the rows."""


@dataclass(frozen=True)
class Rows:
    """Questions in memory in the place of a source: a datasets.Dataset, or rows, or texts."""

    rows: Iterable[Any]

    def __str__(self) -> str:
        """As messages name them."""
        return "prompts"

    def __iter__(self) -> Iterator[Row]:
        if isinstance(self.rows, str | Mapping):
            got = "a text" if isinstance(self.rows, str) else f"the keys {', '.join(self.rows)}"
            raise DataError(f"prompts: expected rows, such as one split of a data set, got {got}")
        for index, row in enumerate(self.rows):
            yield _row(f"prompts, row {index}", {"prompt": row} if isinstance(row, str) else row)


def open_source(source: str | Rows) -> Source:
    """The rows of `source`, in the forms that `load_prompts` lists. Raises DataError."""
    if isinstance(source, Rows):
        return Source(source)
    scheme, _, rest = source.partition(":")
    if scheme == "demo":
        if rest not in DEMO_QUESTIONS:
            known = ", ".join(f"demo:{name}" for name in DEMO_QUESTIONS)
            raise DataError(f"{source}: expected one of {known}")
        return Source(_read_jsonl(DEMO_QUESTIONS[rest]), extractor="whole")
    if scheme == "reasoning_gym":
        return _reasoning_gym(rest)
    path = Path(source).expanduser()
    if path.suffix in READERS:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        return Source(READERS[path.suffix](path))
    if path.exists():
        raise DataError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    if source.startswith((".", "/", "~")) or ("/" not in source and path.suffix):
        raise DataError(f"{path}: no such file; known are files that end in {', '.join(READERS)}")
    return Source(_hub(source))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _row(where, _parse_json(line.strip(), where))


def _read_json(path: Path) -> Iterator[Row]:
    items = _parse_json(path.read_bytes(), str(path))
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a list of objects, got {type(items).__name__}")
    for index, item in enumerate(items):
        yield _row(f"{path}, item {index}", item)


def _read_csv(path: Path) -> Iterator[Row]:
    """All values stay text: an answer 007 is not the number 7."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                where = f"{path}, line {reader.line_num}"
                if None in values or None in values.values():
                    raise DataError(f"{where}: expected {len(reader.fieldnames or ())} columns")
                yield Row(where, values)
        except (csv.Error, UnicodeDecodeError) as error:
            where = f"{path}, line {reader.reader.line_num}"
            raise DataError(f"{where}: malformed CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for index, columns in enumerate(rows):
            yield Row(f"{path}, row {index}", columns)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        at = f"{where}, line {error.lineno}" if error.lineno > 1 else where
        raise DataError(f"{at}: malformed JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error}") from error


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return Row(where, value)


def _hub(source: str) -> Iterator[Row]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    owner_and_name, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]) or None
    try:
        rows = load_dataset(owner_and_name, config, split=split or "train")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}: no such file, and not loaded as a Hugging Face data set "
            f"ID[/CONFIG][:SPLIT]: {error}"
        ) from error
    for index, columns in enumerate(rows):
        yield Row(f"{source}, row {index}", columns)


def _reasoning_gym(request: str) -> Source:
    if find_spec("reasoning_gym") is None:
        raise DataError("reasoning_gym is not installed; pip install reasoning-gym")
    from reasoning_gym.factory import DATASETS

    task, _, query = request.partition("?")
    if task not in DATASETS:
        raise DataError(f"reasoning_gym has no task {task!r}{_nearest(task, DATASETS)}")
    try:
        pairs = parse_qsl(query, strict_parsing=True) if query else []
    except ValueError as error:
        raise DataError(f"reasoning_gym:{request}: expected OPTION=VALUE&...: {error}") from error
    options = {"size": 50, "seed": 0, **{name: _parse_option(value) for name, value in pairs}}
    shots = options.pop("shots", SHOTS)
    if not isinstance(shots, int) or shots < 0:
        raise DataError(f"reasoning_gym:{request}: shots: expected a whole number, got {shots!r}")
    known = [field.name for field in fields(DATASETS[task][1])]
    for name in options:
        if name not in known:
            near = _nearest(name, [*known, "shots"])
            raise DataError(f"reasoning_gym:{task} has no option {name!r}{near}")
    entries = _draw(task, options)
    prefix = ""
    if shots:
        asked = {entry["question"] for entry in entries}
        prefix = _worked_examples(task, options, shots, asked)
    rows = (Row(f"reasoning_gym:{task}, item {i}", entry) for i, entry in enumerate(entries))
    judge = _own_scorer(task, options)
    if judge is None and not all(entry["answer"] for entry in entries):
        raise DataError(
            f"reasoning_gym:{task} has neither answers nor a scorer to learn or score by"
        )
    if not shots:
        return Source(rows, task=judge)
    # The examples show one-line answers, and a base model goes on with a question of its own.
    return Source(rows, prefix, extractor="whole", stop="\n", task=judge)


def _draw(task: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    from reasoning_gym.factory import create_dataset

    try:
        return list(create_dataset(task, **options))
    except (AssertionError, TypeError, ValueError) as error:  # configurations assert their options
        raise DataError(
            f"reasoning_gym:{task}: the options {options} do not fit: {error}"
        ) from error


def _own_scorer(task: str, options: Mapping[str, Any]) -> Task | None:
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    if DATASETS[task][0].score_answer is ProceduralDataset.score_answer:
        return None  # that one gives a part for an answer that contains the right one
    return Task(task, json.dumps(options))


def _worked_examples(
    task: str, options: Mapping[str, Any], shots: int, asked: AbstractSet[str]
) -> str:
    """Solved questions of the same task, distinct and none of them asked, one after the other.

    A base model goes on after its answer and invents a question: the answer ends at the first line
    break.
    """
    pool = _draw(task, {**options, "seed": SHOTS_SEED, "size": 20 * shots})
    solved = {e["question"]: e["answer"] for e in pool if e["question"] not in asked}
    if not all(solved.values()):
        raise DataError(
            f"reasoning_gym:{task}: shots: its questions come without answers to show; expected "
            f"shots=0, got {shots}"
        )
    if len(solved) < shots:
        raise DataError(f"reasoning_gym:{task}: shots: only {len(solved)} other questions to show")
    return "".join(f"{question} {answer}\n" for question, answer in islice(solved.items(), shots))


def _parse_option(value: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
