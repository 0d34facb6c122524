"""Tool calls written in a text, `CALL tool:"..."` on a line of their own, and their answers.

The answer is one line, `RESULT: ...`, below the call. Tools: `calculator`, arithmetic over a
parsed expression (nothing is evaluated by Python itself, and every step is bounded), and
`scratchpad`, which keeps the last lines that were given to it and shows them all.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import deque
from collections.abc import Callable
from itertools import zip_longest
from typing import Union

from trainer.data import DataError
from trainer.data.shapes import Piece, Span

Number = Union[int, float]

SCRATCHPAD_LINES = 8
_CALL = re.compile(r'\s*CALL\s+(\w+)\s*:\s*"(.*)"\s*')
_MOST_CHARACTERS, _MOST_NODES, _MOST_BITS = 500, 200, 4096
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "log2": math.log2, "log10": math.log10,
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "asin": math.asin, "acos": math.acos,
    "atan": math.atan, "floor": math.floor, "ceil": math.ceil, "gcd": math.gcd, "abs": abs,
    "round": lambda x, digits=0: round(x, max(-15, min(15, digits))), "min": min, "max": max,
}  # fmt: skip


def answered(text: str, at: str, fill: bool = True) -> Piece:
    """`text` with a `RESULT:` line below every call that has none yet (`fill` off: as it is).
    Results are never learned: the tool says them. Errors: `DataError` for an unknown tool."""
    scratchpad: deque[str] = deque(maxlen=SCRATCHPAD_LINES)
    lines = text.splitlines(keepends=True)
    out: list[str] = []
    learned: list[Span] = []
    begin = size = 0
    for line, following in zip_longest(lines, lines[1:], fillvalue=""):
        if _is_result(line):
            learned.append((begin, size))
            begin = size + len(line)
        out.append(line)
        size += len(line)
        call = _CALL.fullmatch(line.rstrip("\r\n"))
        if call is None or not fill:
            continue
        if _is_result(following):  # answered by the author
            if call[1] == "scratchpad":
                _note(scratchpad, call[2])
            continue
        result = f"RESULT: {_answer(call[1], call[2], scratchpad, at)}"
        if following:
            result += "\n"
        elif not line.endswith("\n"):
            out.append("\n")
            size += 1
        out.append(result)
        learned.append((begin, size))
        begin = size = size + len(result)
    learned.append((begin, size))
    return Piece("".join(out), tuple(span for span in learned if span[0] < span[1]))


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, at most 12 digits after rounding for fractions.
    Errors: ValueError with a short reason, for anything but bounded arithmetic."""
    if len(expression) > _MOST_CHARACTERS:
        raise ValueError("too long")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError("not an expression") from error
    if sum(1 for _ in ast.walk(tree)) > _MOST_NODES:
        raise ValueError("too long")
    try:
        value = _value(tree.body)
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    except (OverflowError, TypeError) as error:
        raise ValueError("no finite number") from error
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError("no finite number")
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"


def _answer(tool: str, argument: str, scratchpad: deque[str], at: str) -> str:
    if tool == "scratchpad":
        _note(scratchpad, argument)
        return " | ".join(scratchpad)
    if tool != "calculator":
        raise DataError(f"{at}: CALL of '{tool}': no such tool; allowed: calculator, scratchpad")
    try:
        return calculate(argument)
    except ValueError as error:
        return f"error: {error}"


def _note(scratchpad: deque[str], argument: str) -> None:
    scratchpad.append(" ".join(argument.split()))


def _is_result(line: str) -> bool:
    return line.lstrip().startswith("RESULT:")


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            return _bounded(function(*map(_value, node.args)))
    raise ValueError("only arithmetic is allowed")


def _power(base: Number, exponent: Number) -> Number:
    """base ** exponent, refused before it is computed where it would not fit."""
    if isinstance(base, int) and isinstance(exponent, int):
        if base.bit_length() * max(exponent, 1) > _MOST_BITS:
            raise ValueError("too large")
        if exponent >= 0:
            return int(pow(base, exponent))
    value: Union[float, complex] = float(base) ** float(exponent)
    if isinstance(value, complex):  # a root of a negative number
        raise ValueError("no real number")
    return value


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError("too large")
    return value
