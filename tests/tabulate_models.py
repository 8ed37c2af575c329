"""Write docs/models.md: which model families pyrl samples from and trains, tried on tiny models.

    python tests/tabulate_models.py

Those that pass the trial at load are tried once more on texts as long as the model's room.
"""

import warnings
from pathlib import Path

import torch
import transformers
from model_families import FAMILIES, tiny
from transformers import PreTrainedModel

from pyrl.engine import trial
from pyrl.models import ModelError, room

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEAD = """# Models

Each family below was built with random weights (two layers, 64 positions, window 16 where there
is one, transformers {version}), and tried as a run tries its model when it loads it: prompts
packed in one row, and tokens decoded one by one beside another row, against transformers' own
forward of each text alone; then texts as long as the model's room. A refusal comes before
anything is sampled and ends the command with exit code 2.

The trial takes nine tokens, in the precision of the weights, and draws no random numbers
(`pyrl/engine/trial.py`). Prompt and response together never exceed the *room* of a model: its
positions, or the length at which LongRoPE scales all positions of a batch
anew. A question that leaves too little room for `max_tokens` is refused when the data is read.

Written by `python tests/tabulate_models.py`.

| family | class | result | room of the tiny model |
|---|---|---|---|
"""


def tried(model: PreTrainedModel) -> str:
    """ok, or the words of the refusal."""
    name = type(model).__name__
    try:
        trial.check_sampling(model)
        trial.check_learning(model)
    except ModelError as error:
        said = str(error).removeprefix(f"{name} cannot be sampled from or trained: ")
        return said.removeprefix(f"{name}: ").replace("|", "\\|")
    return "ok" if at_full_length(model) else "WRONG at full length"


def at_full_length(model: PreTrainedModel) -> bool:
    """Whether texts that fill the room have the numbers of the plain forward."""
    longest, vocabulary = room(model).tokens, model.get_input_embeddings().num_embeddings
    text_N = [torch.arange(n) * 11 % (vocabulary - 3) + 3 for n in (longest, longest - 3)]
    with torch.no_grad():
        plain_N = trial._plain(model, text_N)
        row_N = trial._decoded(model, text_N)
    last = trial.DECODED + 1
    return all(
        torch.allclose(row, plain[-last:], atol=1e-3)
        for row, plain in zip(row_N, plain_N, strict=True)
    )


def main() -> None:
    """Try all families and write the page."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    lines = []
    for family in sorted(FAMILIES):
        model = tiny(family)
        result = tried(model)
        space = room(model).tokens if result == "ok" else ""
        lines.append(f"| {family} | {type(model).__name__} | {result} | {space} |\n")
        print(lines[-1], end="", flush=True)
    PAGE.write_text(HEAD.format(version=transformers.__version__) + "".join(lines))


if __name__ == "__main__":
    main()
