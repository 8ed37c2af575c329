"""The page of a comparison: one HTML file with the picture and all tables in it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from string import Template
from typing import Any

from pyrl.compare.tables import facts, tables, title

PAGE = Template(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ccc; padding: .2rem .7rem; white-space: nowrap }
td { text-align: right }
td:first-child { text-align: left }
p { color: #555; max-width: 60rem }
img { max-width: 100% }
</style>
<h1>$title</h1>
<p>$facts</p>
<img alt="curves and scores" src="data:image/png;base64,$picture">
$tables
</html>
"""
)


def page(record: Mapping[str, Any], picture: bytes) -> str:
    """The page; `picture` is a PNG."""
    return PAGE.substitute(
        title=escape(title(record)),
        facts=escape(facts(record)),
        picture=b64encode(picture).decode(),
        tables="\n".join(table.html() for table in tables(record)),
    )
