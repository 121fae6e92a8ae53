"""The steps of a written chain of thought: equations, annotations such as <<5*3=15>>, one nested equation.

Knows nothing about files or questions.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from experiments.tasks.answers import field_number
from experiments.tasks.numbers import OutOfRange, shown

__all__ = ["equation_steps", "step_values", "steps_of"]

_STEP_FIELDS = ("cot", "steps", "Equation", "lEquations", "answer")
_ANNOTATION = re.compile(r"<<((?:(?!<<).)*?)>>")
_EQUATION = re.compile(r"(?:[-+*/().,\d\s]|(?<=[\d)])%(?=\d))+=\s*[-+]?[.,\d]+")  # % before a figure: the remainder


def steps_of(record: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The first field that holds steps (annotations, equations, or one nested equation), and the steps.

    Returns:
        Name of the field and its steps; "" and () where they are unknown.
    """
    for field in _STEP_FIELDS:
        value = record.get(field)
        parts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
        if field in ("Equation", "lEquations"):
            steps = tuple(step for part in parts for step in equation_steps(_whole_text(part)))
        else:
            steps = tuple(step for part in parts for step in _annotated(_whole_text(part), field != "answer"))
        if steps:
            return field, steps
    return "", ()


def step_values(steps: tuple[str, ...], decimal_comma: bool = False) -> tuple[int | float, ...]:
    """Value of each step; () if one of them cannot be read, so that positions never shift.

    Raises:
        ValueError: a value is a number that no float holds.
    """
    values: list[int | float] = []
    for step in steps:
        written = step.rsplit("=", 1)[-1] if "=" in step else ""
        try:
            values.append(field_number(written, decimal_comma))
        except OutOfRange as error:
            raise ValueError(f"the value of the step {shown(step)} cannot be held: {error}") from None
        except ValueError:
            return ()
    return tuple(values)


def equation_steps(equation: str) -> tuple[str, ...]:
    """Steps of one nested equation in the order of evaluation.

    "X=((32.0+42.0)-35.0)" gives ("32+42=74", "74-35=39"); an equation that cannot be read gives ().
    """
    steps: list[str] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                sign, result = "+", left + right
            elif isinstance(node.op, ast.Sub):
                sign, result = "-", left - right
            elif isinstance(node.op, ast.Mult):
                sign, result = "*", left * right
            elif isinstance(node.op, ast.Div):
                sign, result = "/", left / right
            else:
                raise ValueError(f"operator {type(node.op).__name__}")
            steps.append(f"{_plain(left)}{sign}{_plain(right)}={_plain(result)}")
            return result
        raise ValueError(f"not arithmetic: {type(node).__name__}")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's remarks on text that is no equation
            value(ast.parse(equation.split("=")[-1].strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):  # of deep nesting
        return ()
    return tuple(steps)


def _whole_text(part: Any) -> str:
    return part if isinstance(part, str) else shown(part, 10_000)


def _annotated(text: str, bare: bool) -> list[str]:
    found = [step.strip() for step in _ANNOTATION.findall(text)]
    if not found and bare and _EQUATION.fullmatch(text.strip()):
        found = [text.strip()]
    return found


def _plain(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else f"{float(number):g}"
