"""Write docs/methods.md: every method and choice by name, with its source and what differs.

python tests/tabulate_methods.py
"""

from pathlib import Path

from pyrl.methods.pages import markdown
from pyrl.methods.registry import Registry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"

if __name__ == "__main__":
    PAGE.write_text(markdown(Registry()), "utf-8")
