r"""What a verifier process knows about mathematics: math-verify on LaTeX answers.

Loaded by file in the workers of a `VerifierPool`, never imported by the training process: parsing
and simplifying what a model wrote can take any amount of time and memory.
"""

from __future__ import annotations

import cmath
import logging
from functools import lru_cache
from typing import Any
from zlib import crc32

import sympy
from math_verify import LatexExtractionConfig, parse, verify

logging.disable(logging.CRITICAL)  # math-verify logs each answer that it cannot parse

_PROBES = (r"2^{3}+\sqrt{2}", r"x+\sqrt{2}")


@lru_cache(maxsize=4096)
def _parsed(answer: str) -> Any:
    """A sympy object, or None where the answer is not mathematics.

    The time-outs of math-verify are off: they are signals, which C code does not see. The pool's
    hold.
    """
    found = parse(
        rf"\boxed{{{answer}}}",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not found or isinstance(found[0], str):
        return None
    if isinstance(found[0], sympy.Basic) and found[0].has(sympy.zoo, sympy.nan):
        return None
    return found[0]


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
    if isinstance(expression, sympy.Float):
        expression = sympy.Rational(str(expression))
    value = _value(expression)
    if isinstance(expression, sympy.Rational):
        return "number", str(expression), value
    if value is None:
        for probe in _PROBES:
            equal(answer, probe)
    return "expression", sympy.srepr(expression), value


def equal(a: str, b: str) -> bool:
    """Either order: math-verify treats its gold and its target argument differently."""
    left, right = _parsed(a), _parsed(b)
    if left is None or right is None:
        return False
    return any(
        verify(gold, target, timeout_seconds=None, raise_on_error=True)
        for gold, target in ((left, right), (right, left))
    )
