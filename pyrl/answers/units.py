r"""Units: what stands behind, or as a currency before, the number of an answer.

Any noun can be a unit (`12 apples`); a word that changes the value (`half`, `more`, `below`) is
none. A unit is told in one spelling, so that `5 cm` and `5 centimeters` are the same; nothing is
converted: `1 m` and `100 cm` are different answers.
"""

from __future__ import annotations

import re

_NAMES = {
    "°": "degree deg",
    "dollar": "usd",
    "euro": "eur",
    "pound": "gbp lb",
    "yen": "jpy",
    "rupee": "rs inr",
    "cent": "¢",
    "meter": "m metre",
    "centimeter": "cm centimetre",
    "millimeter": "mm millimetre",
    "kilometer": "km kilometre",
    "inch": "in",
    "foot": "ft feet",
    "yard": "yd",
    "mile": "mi",
    "gram": "g gm",
    "kilogram": "kg kilo",
    "milligram": "mg",
    "ounce": "oz",
    "liter": "L litre",
    "milliliter": "ml mL millilitre",
    "second": "s sec",
    "millisecond": "ms",
    "minute": "min",
    "hour": "h hr",
    "day": "",
    "week": "wk",
    "month": "mo",
    "year": "yr",
    "newton": "N",
    "joule": "J",
    "kilojoule": "kJ",
    "watt": "W",
    "kilowatt": "kW",
    "volt": "V",
    "hertz": "Hz",
    "kilohertz": "kHz",
    "pascal": "Pa",
    "kilopascal": "kPa",
    "mole": "mol",
    "mile/hour": "mph",
    "kilometer/hour": "kph kmh",
    "th": "st nd rd",
    "radian": "rad",
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
}
_UNIT_OF = {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split())}
"""Singular; single letters and abbreviations by case."""
_LETTERS = "msghLNJWV°"
"""Letters that are units behind a space: `5 m` is a length, `5m` a product."""

_TEMPERATURES = {"C": "celsius", "F": "fahrenheit"}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_JOINTS = {"/": "/", "per": "/", "·": "·", r"\cdot": "·", "squared": "^2", "cubed": "^3"}
_SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PERCENT = {"percent", "percentage", "pct"}
_SMALL_WORDS = {"of", "in", "a", "an", "per", "the", "each", "every"}
_OTHER_WORDS = """
and or not to no if is are was than but as at by up plus minus over under into more less fewer
greater below above before after positive negative approximately about least most odd even
half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh
sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths
dozen dozens score gross lakh crore hundreds thousands millions billions trillions percents
permille ppm mod modulo base binary octal hex hexadecimal decimal factorial root roots divided
multiplied remainder bc bce ad ce am pm noon midnight zero one two three four five six seven
eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
twenty thirty forty fifty sixty seventy eighty ninety squared cubed doubled tripled halved inverse
abc abcd xyz uvw pqr rst mnp sin cos tan csc cot log exp
"""
_NOT_UNITS = frozenset(_OTHER_WORDS.split())
"""Words behind a number that change it, and letters that are multiplied with it."""

_PART = re.compile("(?:ieth|teenth|elfth|leventh)$")
"""Of a whole: 3 twentieths."""
_BEFORE = re.compile(
    r"([-+]?) ?(?:US ?)?(\\\$|\$|\\(?:euro|pounds|yen|rupee)(?![A-Za-z])) ?(?=[-+]?[\d.\\])"
)
_BEHIND = re.compile(r"(?<=\d) ?(\\\$|\\(?:euro|pounds|yen|rupee|cents) ?)$")
_SIGNS = {"$": "dollar", "euro": "euro", "pounds": "pound", "yen": "yen", "rupee": "rupee"}
_SIGNS["cents"] = "cent"
_ASSIGNED = re.compile(r"[A-Za-z] ?= ?(?=\S)")
_COMMANDS = re.compile(
    r"\\(?:[dtc]?frac|sqrt|pi|times|cdot|left|right|infty|pm|le|ge|%|[{}])(?![A-Za-z])"
)
_TAIL = re.compile(r"\\?[^\W\d_]+|°")
_UNIT = re.compile(r"(?:[^\W\d_]+|°)(?:(?: ?[ /·-] ?| ?\\cdot ?)?(?:[^\W\d_]+|\^ ?\{?-?\d\}?))*")
_TOKEN = re.compile(r"[^\W\d_]+|°|\^ ?\{?(-?\d)\}?|[/·]|\\cdot")
_NUMERIC_END = re.compile(r"(?:[\d)}!%]|\\pi|\\infty)\s*$")
_FONT_TAIL = re.compile(r"\\(?:text|mathrm|textrm|mbox|textit|rm)\{([^{}\\]*)\}(\^\{?\d\}?)?$")


def numeric_tail(text: str) -> tuple[str, str] | None:
    r"""The number and the unit of a text that is both, without `\text`; None for another one."""
    text = " ".join(text.split())
    sign = _BEFORE.match(text)
    if sign is not None:
        rest = sign[1] + text[sign.end() :]
        tail = numeric_tail(rest) if not _BEFORE.match(rest) else None
        body, unit = tail or (rest, "")
        currency = _SIGNS[sign[2].lstrip("\\")]
        return body, f"{currency} {unit}" if unit and unit != currency else currency
    behind = _BEHIND.search(text)
    if behind is not None:
        return text[: behind.start()], _SIGNS[behind[1].strip().lstrip("\\")]
    assigned = _ASSIGNED.match(text)
    begin = 0 if assigned is None else assigned.end()
    split = next((m.start() for m in _TAIL.finditer(text, begin) if not _known(text, m)), None)
    if split is None:
        return None
    body, tail_text = text[:split], text[split:].rstrip(". ")
    if not _NUMERIC_END.search(body) or body.count("{") != body.count("}"):
        return None
    return _scaled(body, tail_text)


def _known(text: str, match: re.Match[str]) -> bool:
    return match[0].startswith("\\") and _COMMANDS.match(text, match.start()) is not None


def _scaled(body: str, tail: str) -> tuple[str, str] | None:
    """The number with a word of size or a percent sign, and the unit behind it."""
    glued = body[-1].isdigit()
    word, _, rest = tail.partition(" ")
    body = body.rstrip()
    if word.lower() in _SCALE:
        body, tail = rf"{body}\times 10^{{{_SCALE[word.lower()]}}}", rest
    elif word.lower() in _PERCENT:
        body, tail = rf"{body}\%", rest
    if not tail:
        return body, ""
    unit = _unit(tail, glued)
    return None if unit is None else (body, unit)


def unit_tail(text: str) -> tuple[str, str] | None:
    r"""An expression with letters and its unit, which has to be a known one in `\text{...}`."""
    match = _FONT_TAIL.search(text)
    body = "" if match is None else text[: match.start()].rstrip()
    if match is None or not body or not all(map(_known_unit, match[1].split())):
        return None
    unit = _unit(match[1].strip() + (match[2] or ""))
    return None if unit is None else (body, unit)


def _unit(tail: str, glued: bool = False) -> str | None:
    """The one spelling of a unit; None if these words are none."""
    if not _UNIT.fullmatch(tail):
        return None
    parts: list[str] = []
    power = ""
    for token in _TOKEN.finditer(tail):
        word = token[0].lower()
        if token[1]:
            parts.append(f"^{token[1]}")
        elif word in _JOINTS and parts:
            parts.append(_JOINTS[word])
        elif word in _POWERS:
            power = _POWERS[word]
        else:
            name = _name(token[0], after=parts)
            if name is None or (glued and not parts and not _known_unit(token[0])):
                return None
            parts.append(name + power)
            power = ""
    return re.sub(r" ?([/·^]) ?", r"\1", " ".join(parts)) or None


def _known_unit(word: str) -> bool:
    spellings = {word, word.lower(), _singular(word.lower())}
    return word == "°" or (len(word) > 1 and not spellings.isdisjoint(_UNIT_OF))


def _name(word: str, after: list[str]) -> str | None:
    """One spelling of a word of a unit; None for a word that is none."""
    if word in _TEMPERATURES and after == ["°"]:
        return _TEMPERATURES[word]
    lower = _singular(word.lower())
    if len(word) == 1:
        return _UNIT_OF[word] if word in _LETTERS else None
    if {word.lower(), lower} & _NOT_UNITS or _PART.search(lower):
        return None
    for spelling in (word, word.lower(), lower):
        if spelling in _UNIT_OF:
            return _UNIT_OF[spelling]
    if len(word) < 3 and lower not in _SMALL_WORDS:
        return None
    return lower if re.search(r"[aeiouy]|[^\x00-\x7f]", lower) else None


def _singular(word: str) -> str:
    if word.endswith("ies"):
        return word[:-3] + "y"
    return re.sub(r"(?<=x|z|h)es$|(?<=ss)es$|(?<=[^su])s$", "", word)
