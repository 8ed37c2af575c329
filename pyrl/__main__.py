"""`python -m pyrl` is `pyrl`."""

from pyrl.cli import main

main()
