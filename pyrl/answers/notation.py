r"""One notation for answers: what people and models write, as the LaTeX that math-verify reads.

Only the dress is changed here (Markdown, `\text`, signs of Unicode, plain-text roots); what a value
is, and which values are equal, stays with math-verify. Every step takes linear time.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from pyrl.answers.units import numeric_tail, unit_tail

_CHARACTERS = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
        **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u3000\t\n\r", " "),
        **dict.fromkeys("\u200b\u2060\ufeff", ""),
        **dict.fromkeys("º˚", "°"),
        **dict.fromkeys("’′", "'"),
        "\N{MINUS SIGN}": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "⁄": "/",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∞": r"\infty ",
        "π": r"\pi ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "±": r"\pm ",
        "€": r"\euro ",
        "£": r"\pounds ",
        "¥": r"\yen ",
        "₹": r"\rupee ",
        "¢": r"\cents ",
    }
)
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_LOWERED = re.compile(f"[{_SUBSCRIPTS}]+")
_DOWN = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, "0123456789+-" + "0123456789")
_VULGAR = {
    sign: unicodedata.normalize("NFKD", sign).split("\N{FRACTION SLASH}")
    for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒"
}
_VULGAR_SIGN = re.compile(f"[{''.join(_VULGAR)}]")

_RANGE = re.compile(r"\d\s*[–—]\s*\d")
"""A dash between two numbers: from one to the other, not their difference."""

_FONTS = r"\\(?:text(?:bf|it|rm|normal|sf|tt|up)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|mbox|emph)"
_DRESS = (
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ("$$", "$$"),
    ("$", "$"),
    (r"\[", r"\]"),
    (r"\(", r"\)"),
    ("*", "*"),
)
_WRAPPER = re.compile(rf"(?:{_FONTS}|\\(?:boxed|fbox|displaystyle|textstyle))?\s*\{{")
_STYLE = re.compile(r"\\(?:displaystyle|textstyle|bf|rm)(?![A-Za-z])\s*|\\textdollar(?![A-Za-z])")
_NUMBER_IN_FONT = re.compile(rf"{_FONTS}\s*\{{([^A-Za-z{{}}\\]*)\}}")
_WORDS_IN_FONT = re.compile(rf"{_FONTS}\s*\{{([^{{}}\\]*)\}}")

_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;: !]|~|\{,\})(?=\d{3}(?!\d))")
_SPACED_THOUSANDS = re.compile(r"([-+]?\d{1,3})((?: \d{3})+)(\.\d+)?(?![\d ])(?=\D|$)")
_GAP = re.compile(r"(?<!\\)\\[,;:! ]|~|\\(?:q?quad|thinspace|enspace)(?![A-Za-z])")
_FULL_STOP = re.compile(r"(?<=[\w\]})%$*`°])\.$")
_MIXED = re.compile(r"([-+]?)(\d+) (\d+)/(\d+)")
_DIGIT_FRACTION = re.compile(r"\\([dtc]?frac) ?(\d) ?(\d)(?!\d)")
_SCIENTIFIC = re.compile(r"(?<![\w.}\\])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d+)(?![\w.])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX*]\s*10\s*\^")
_SIGNED_POWER = re.compile(r"\^\s*([-+]?\d+(?:\.\d+)?)(?![\d.])")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))")
_ROOT_OF = re.compile(r"(?:√|(?<![A-Za-z\\])\\?sqrt)\s*\(")
_REPEATING = re.compile(r"(?<![\d.,])(\d*)\.(\d*)\\(?:overline|bar) ?\{(\d+)\}")
_PI = re.compile(r"(?<![\\A-Za-z])[pP]i(?![A-Za-z])")
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|Infinity|inf|oo)(?![A-Za-z])")
_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])((?:arc|a)?(?:sin|cos|tan)h?|sec|csc|cot|log|ln|exp)(?=\s*[(\d\\]|\s+[A-Za-z]\b)"
)
_TRIGONOMETRIC = re.compile(r"\\(?:arc)?(?:sin|cos|tan|sec|csc|cot)")
_DEGREE = re.compile(
    r"\s*(?:\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\}|°)|\\degrees?(?![A-Za-z]))"
)
_CASES = re.compile(
    r"\\begin\{(cases|aligned|align\*?|gathered|split|equation\*?)\}(.*)\\end\{\1\}"
)


@dataclass(frozen=True)
class Reading:
    """An answer as it is compared."""

    body: str
    """LaTeX without dress and without a unit."""
    unit: str = ""
    """In one spelling ("hour", "meter/second^2"); empty: a bare value."""


def read(answer: str) -> Reading:
    """The value and the unit of an answer."""
    text = _undress(_characters(answer))
    text = _one_line(_numbers(_spaces(text)))
    text = _DEGREE.sub("°", _roots(_INFINITY.sub(r"\\infty ", _PI.sub(r"\\pi ", text))))
    words = _WORDS_IN_FONT.sub(r" \1 ", text)
    body, unit = numeric_tail(words) or unit_tail(text) or (text, "")
    body = _functions(body.strip())
    if "°" in body:
        body = body.replace("°", r"^{\circ}" if _TRIGONOMETRIC.search(body) else "")
    return Reading(body.strip(), unit)


def _characters(answer: str) -> str:
    r"""Signs of Unicode as LaTeX: 10³ is 10^{3}, 1½ is 1\frac{1}{2}; dashes are minus signs."""
    text = answer.translate(_CHARACTERS)
    if not _RANGE.search(text):
        text = text.replace("–", "-").replace("—", "-")
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_DOWN)}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{match[0].translate(_DOWN)}}}", text)
    return _VULGAR_SIGN.sub(lambda match: r"\frac{{{}}}{{{}}}".format(*_VULGAR[match[0]]), text)


def _undress(text: str) -> str:
    """Without Markdown, math delimiters and commands around the whole, and without a full stop."""
    before = None
    while before != text:
        before = text
        text = _FULL_STOP.sub("", _STYLE.sub("", text).strip())
        for opening, closing in _DRESS:
            inner = text[len(opening) : -len(closing)]
            whole = len(text) > len(opening + closing) and text == opening + inner + closing
            if whole and opening not in inner and closing not in inner:
                text = inner.strip()
        text = _unwrap(text)
    return text


def _unwrap(text: str) -> str:
    r"""The content of `\text{...}`, `\boxed{...}` or `{...}`, if that is the whole text."""
    match = _WRAPPER.match(text)
    if match is None or _close(text, match.end(), "{", "}") != len(text) - 1:
        return text
    return text[match.end() : -1].strip()


def _close(text: str, begin: int, opening: str, closing: str) -> int:
    """Where the bracket that was opened before `begin` is closed; -1: nowhere."""
    depth = 1
    for at in range(begin, len(text)):
        if text[at] in (opening, closing) and text[at - 1] != "\\":
            depth += 1 if text[at] == opening else -1
            if depth == 0:
                return at
    return -1


def _spaces(text: str) -> str:
    text = _NUMBER_IN_FONT.sub(r"\1", _THOUSANDS.sub("", text))
    text = " ".join(_GAP.sub(" ", text).split())
    whole = _SPACED_THOUSANDS.match(text)
    if whole is None:
        return text
    return f"{whole[1]}{whole[2].replace(' ', '')}{whole[3] or ''}{text[whole.end() :]}"


def _numbers(text: str) -> str:
    r"""Mixed numbers, repeating decimals, powers of ten and powers, as LaTeX."""
    mixed = _MIXED.match(text)
    if mixed is not None and int(mixed[3]) < int(mixed[4]):
        text = r"{}{}\frac{{{}}}{{{}}}".format(*mixed.groups()) + text[mixed.end() :]
    text = _REPEATING.sub(_repeating, text.replace(r"\varnothing", r"\emptyset"))
    text = _DIGIT_FRACTION.sub(r"\\\1{\2}{\3}", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _TIMES_TEN.sub(r"\\times 10^", text.replace("**", "^"))
    return _SIGNED_POWER.sub(r"^{\1}", text)


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as the fraction (16 - 1) / 90."""
    whole, once, again = match.groups()
    top = int(whole + once + again) - int(whole + once or 0)
    return rf"\frac{{{top}}}{{{'9' * len(again)}{'0' * len(once)}}}"


def _roots(text: str) -> str:
    r"""√2, √(x+1) and sqrt(x+1) as `\sqrt{...}`."""
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    parts = []
    while (match := _ROOT_OF.search(text)) is not None:
        end = _close(text, match.end(), "(", ")")
        if end < 0:
            break
        parts.append(text[: match.start()] + r"\sqrt{")
        text = text[match.end() : end] + "}" + text[end + 1 :]
    return "".join(parts) + text


def _functions(text: str) -> str:
    return _FUNCTION.sub(lambda match: rf"\{re.sub('^a(?!rc)', 'arc', match[1])} ", text)


def _one_line(text: str) -> str:
    r"""Equations in an environment as a list; a value by cases, in columns, is left alone."""
    match = _CASES.fullmatch(text)
    if match is None:
        return text
    lines = [line.strip(" &,") for line in match[2].replace("&=", "=").split(r"\\")]
    if any("&" in line for line in lines):
        return text
    return ", ".join(line for line in lines if line)
