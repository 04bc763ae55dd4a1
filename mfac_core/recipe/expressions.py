"""Arithmetic in recipes: a small evaluator for numbers, variables and a few operations.

Python parses the expression, but never runs it. Anything that is not in the tables below is refused by name.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping

__all__ = ["ExpressionError", "evaluate"]

_MAX_LENGTH = 1000
# No integer grows beyond what a float can represent, so no operation can take long.
_MAX_INT = int(1e308)
_MAX_DECIMALS = 300

_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[float], float]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_ALLOWED = "numbers, variables, + - * / // ** %, parentheses, and abs, float, int, max, min, round"

Lookup = Callable[[str], object]


class ExpressionError(ValueError):
    """An expression that cannot be evaluated; the message says why."""


def evaluate(expression: str, variable: Lookup) -> int | float:
    """Return the value of an arithmetic expression, a finite number; ``variable`` returns the value of a variable.

    Example:
        >>> evaluate("warmup + max(2, epochs // 4)", {"warmup": 1.5, "epochs": 30}.__getitem__)
        8.5
    """
    if len(expression) > _MAX_LENGTH:
        raise ExpressionError(f"it is longer than {_MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(expression.strip(), mode="eval")
        return _number(tree.body, variable)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ExpressionError(f"it is not an expression; allowed are {_ALLOWED}") from error


def _value(node: ast.expr, variable: Lookup) -> object:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return node.value
        case ast.Name():
            return variable(node.id)
        case ast.BinOp(op=ast.Pow()):
            return _power(_number(node.left, variable), _number(node.right, variable))
        case ast.BinOp() if type(node.op) in _BINARY:
            return _compute(_BINARY[type(node.op)], _number(node.left, variable), _number(node.right, variable))
        case ast.UnaryOp() if type(node.op) in _UNARY:
            return _compute(_UNARY[type(node.op)], _number(node.operand, variable))
        case ast.Call(func=ast.Name(id=name)) if not node.keywords:
            return _call(name, node.args, variable)
    raise ExpressionError(f"{ast.unparse(node)} is not allowed here; allowed are {_ALLOWED}")


def _number(node: ast.expr, variable: Lookup) -> int | float:
    value = _value(node, variable)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExpressionError(f"{ast.unparse(node)} is {value!r}, which is not a number")
    if not (abs(value) <= _MAX_INT if isinstance(value, int) else math.isfinite(value)):
        raise ExpressionError(f"{ast.unparse(node)} is too large, or not a number")
    return value


def _compute(operation: Callable[..., float], *arguments: object) -> float:
    try:
        return operation(*arguments)
    except ZeroDivisionError:
        raise ExpressionError("it divides by zero") from None
    except OverflowError:
        raise ExpressionError("a value in it is too large") from None


def _power(base: float, exponent: float) -> float:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _MAX_INT.bit_length() + 1:
        raise ExpressionError(f"{base} ** {exponent} is too large")
    result = _compute(operator.pow, base, exponent)
    if isinstance(result, complex):
        raise ExpressionError(f"{base} ** {exponent} is not a real number")
    return result


def _call(name: str, arguments: list[ast.expr], variable: Lookup) -> object:
    match name, len(arguments):
        case "abs", 1:
            return abs(_number(arguments[0], variable))
        case "float" | "int", 1:
            return _converted(name, arguments[0], variable)
        case (("min" | "max"), count) if count > 0:
            choose = min if name == "min" else max
            return choose(_number(argument, variable) for argument in arguments)
        case "round", 1:
            return round(_number(arguments[0], variable))
        case "round", 2:
            decimals = _number(arguments[1], variable)
            if not isinstance(decimals, int) or abs(decimals) > _MAX_DECIMALS:
                raise ExpressionError(f"round(..., {decimals}) needs a whole number of decimals")
            return _compute(round, _number(arguments[0], variable), decimals)
    if name in {"abs", "float", "int", "max", "min", "round"}:
        raise ExpressionError(f"{name} does not take {len(arguments)} arguments")
    raise ExpressionError(f"there is no function {name}; allowed are {_ALLOWED}")


def _converted(name: str, argument: ast.expr, variable: Lookup) -> float:
    value = _value(argument, variable)
    try:
        number = float(value) if isinstance(value, str) else _number(argument, variable)
    except ValueError as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError(f"{ast.unparse(argument)} is {value!r}, which is not a number") from None
    if not math.isfinite(number):
        raise ExpressionError(f"{ast.unparse(argument)} is not a finite number")
    return float(number) if name == "float" else int(number)
