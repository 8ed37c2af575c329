r"""What a verifier process knows about mathematics: math-verify on LaTeX answers.

Loaded by file in the workers of a `VerifierPool`, never imported by the training process: parsing
and simplifying what a model wrote can take any amount of time and memory.
"""

from __future__ import annotations

import cmath
import logging
import re
import sys
from functools import lru_cache
from typing import Any
from zlib import crc32

import math_verify
import math_verify.parser
import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from latex2sympy2_extended.logic import And
from latex2sympy2_extended.sets import FiniteSet
from sympy.core.relational import Relational

sys.set_int_max_str_digits(0)  # the pool's limits hold
logging.disable(logging.CRITICAL)  # math-verify logs that its time-outs are off

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
)
"""math-verify's own, except that units are read before (`pyrl.answers.units`)."""
_DECIMAL = re.compile(r"(?<![\d.])(?<!\d,)(\d*)\.(\d+)(?![\d.])")
_GAMMA = (r"\Gamma", r"\text{GAMMA}")
"""The parser takes both letters for the constant of Euler."""
_DIGITS = 50
"""In which math-verify compares irrational numbers; in its 15 every number below 1e-15 is 0."""
_LAZY = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
_LARGE = 10**4000
"""A longer number is told by its key: the training process keeps Python's limit on digits."""
_PROBES = (r"2^{3}+\sqrt{2}", r"x+\sqrt{2}")


def _from_latex(
    latex: str, *, is_real: bool, convert_degrees: bool, normalization_config: None
) -> Any:
    """Letters keep their case, degrees are an angle; `i` is told by its name (`_symbol`)."""
    return latex2sympy(
        latex,
        is_real=True,
        convert_degrees=True,
        normalization_config=normalization_config,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )


math_verify.parser.latex2sympy = _from_latex
"""`parse` has no option for the case of letters: with its own, `x` and `X` are the same."""


@lru_cache(maxsize=4096)
def _parsed(answer: str) -> Any:
    """A sympy object with exact numbers, or None where the answer is not mathematics.

    The time-outs of math-verify are off: they are signals, which C code does not see. The pool's
    hold.
    """
    found = math_verify.parse(
        rf"\boxed{{{_DECIMAL.sub(_fraction, answer.replace(*_GAMMA))}}}",
        [math_verify.LatexExtractionConfig(normalization_config=_NORMALIZATION)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not found or isinstance(found[0], str):
        return None
    exact = _exact(found[0])
    if isinstance(exact, sympy.Basic) and exact.has(sympy.zoo, sympy.nan):
        return None
    return exact


def _fraction(decimal: re.Match[str]) -> str:
    r"""0.25 as \frac{025}{100}: sympy makes decimals of what is computed with a decimal."""
    return rf"\frac{{{decimal[1]}{decimal[2]}}}{{1{'0' * len(decimal[2])}}}"


def _exact(found: Any) -> Any:
    """The same with rational numbers for decimals, and constants evaluated.

    Lists keep their order, which sympy's own traversal loses.
    """
    if isinstance(found, sympy.MatrixBase):
        return found.applyfunc(_exact)
    if isinstance(found, FiniteSet | And):
        return found.func(*map(_exact, found._unsorted_args))
    if isinstance(found, sympy.Tuple | sympy.Interval | sympy.Union):
        return found.func(*map(_exact, found.args))
    if isinstance(found, Relational):
        return found.func(_exact(found.lhs), _exact(found.rhs), evaluate=False)
    if not isinstance(found, sympy.Expr):
        return found
    leaves: dict[Any, Any] = {
        number: sympy.Rational(str(number)) for number in found.atoms(sympy.Float)
    }
    leaves |= {symbol: _symbol(symbol.name) for symbol in found.free_symbols}
    exact = found.xreplace(leaves)
    return exact if exact.free_symbols or exact.has(*_LAZY) else exact.doit()


def _symbol(name: str) -> Any:
    r"""`i` is the imaginary unit. Long names are compared without case: `\Delta` is D'elta here."""
    if name == "i":
        return sympy.I
    if len(name) > 1:
        name = "".join(letter + "'" if letter.isupper() else letter for letter in name)
    return sympy.Symbol(name, real=True)


def _value(expression: Any) -> tuple[float, float] | None:
    """Real and imaginary part at one fixed point; None for what has no such value."""
    if not isinstance(expression, sympy.Expr):
        return None
    point = {symbol: 1 + crc32(str(symbol).encode()) / 2**32 for symbol in expression.free_symbols}
    try:
        value = complex(expression.evalf(15, subs=point))
    except (ArithmeticError, NotImplementedError, TypeError, ValueError):
        return None
    return (value.real, value.imag) if cmath.isfinite(value) else None


def canonical(answer: str) -> tuple[str, str, tuple[float, float] | None] | None:
    """("number", "p/q", value), ("expression", structural key, value); None: not mathematics.

    Expressions of different value need no comparison. One without a value is compared with two
    simple ones: if it takes all time or memory, it does so here, once and alone, and not in each
    comparison with another answer.
    """
    expression = _parsed(answer)
    if expression is None:
        return None
    value = _value(expression)
    if isinstance(expression, sympy.Rational) and max(abs(expression.p), expression.q) < _LARGE:
        return "number", str(expression), value
    if value is None:
        for probe in _PROBES:
            equal(answer, probe)
    return "expression", _key(expression, answer), value


def _key(expression: Any, answer: str) -> str:
    """Equal for the same expression; for a list also its order, which decides what it equals."""
    if isinstance(expression, FiniteSet):
        expression = sympy.Tuple(_in_order(expression, answer), expression)
    return str(sympy.srepr(expression))


def equal(a: str, b: str) -> bool:
    """Either order: math-verify treats its gold and its target argument differently."""
    left, right = _parsed(a), _parsed(b)
    if left is None or right is None:
        return False
    if isinstance(left, FiniteSet) != isinstance(right, FiniteSet):
        left, right = _in_order(left, a), _in_order(right, b)
        if {type(left), type(right)} == {FiniteSet, sympy.Tuple}:
            return False
    return any(
        math_verify.verify(
            gold,
            target,
            numeric_precision=_DIGITS,
            timeout_seconds=None,
            raise_on_error=True,
        )
        for gold, target in ((left, right), (right, left))
    )


def _in_order(found: Any, answer: str) -> Any:
    r"""A list as a tuple, to be compared with one: `1, 2` can be (1, 2), \{1, 2\} cannot."""
    if isinstance(found, FiniteSet) and len(found._unsorted_args) > 1 and r"\{" not in answer:
        return sympy.Tuple(*found._unsorted_args)
    if isinstance(found, sympy.Interval) and found.is_open:
        return sympy.Tuple(found.start, found.end)
    return found
