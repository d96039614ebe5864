"""source.where: an expression over the columns of a record, such as "width >= 64 and punsafe < 0.5".

It is parsed with ast into functions of a record; nothing else than what is listed in ALLOWED is accepted, and nothing
is evaluated by Python. A column that a record lacks, or that is null or NaN there, is missing. What depends on a
missing value is unknown, as in SQL: `unknown or true` is true, and a record whose expression is unknown is not kept.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

from data_prep.images.decode import Reason

ALLOWED = (
    "names of columns, numbers, strings, True, False, None, ==, !=, <, <=, >, >=, in, not in, +, -, *, /, and, or, not "
    "and parentheses"
)
MAX_CHARACTERS = 1_000
"""Of an expression; a longer one would nest deeper than Python's parser goes."""
SHOWN_CHARACTERS = 100
"""Of an expression, or of a part of it, in a message."""
FILTERED: Reason = "filtered"
NO_VALUE: Reason = "no value"
UNLISTED = (FILTERED, NO_VALUE)
"""Reasons that are counted but not listed, as there may be millions."""
Operation = Callable[[Any, Any], Any]
Names = tuple[str, str]
"""Both sides of an operation, as in the expression."""
COMPARISONS: dict[type, tuple[str, Operation]] = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.In: ("in", lambda item, items: item in items),
    ast.NotIn: ("not in", lambda item, items: item not in items),
}
ARITHMETIC: dict[type, Operation] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SIGNS: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
NUMBER, STRING, BOOLEAN = KINDS = ("a number", "a string", "a boolean")
ORDERED = dict.fromkeys(("<", "<=", ">", ">="), (NUMBER, STRING)) | {"in": (STRING,), "not in": (STRING,)}
"""The kinds of values that a comparison takes, both sides of one kind; others take all."""
Row = Mapping[str, Any]
"""The columns of a record."""
Evaluate = Callable[[Row], Any]


class WrongTypes(ValueError):
    """Values of a record that can't be compared or calculated with."""


class Where:
    """A parsed expression."""

    def __init__(self, expression: str) -> None:
        """Raises ValueError, one sentence, for an expression that is not one of ALLOWED."""
        self.expression = expression
        self.columns: list[str] = []
        """The names of columns in it, in order."""
        if len(expression) > MAX_CHARACTERS:
            raise ValueError(
                f"source.where has {len(expression):,} characters; it must have at most {MAX_CHARACTERS:,}."
            )
        try:
            tree = ast.parse(expression.strip(), mode="eval").body
            self._evaluate = self._compile(tree, "condition")
            if not self.columns:
                self._refuse(tree, "it names no column")
        except (SyntaxError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
            raise ValueError(
                f"source.where is {quoted(expression)}, which is not an expression ({reason}){_allowed()}"
            ) from None

    def refusal(self, row: Row) -> Reason | None:
        """Why a record is not kept; None if it is. Raises WrongTypes."""
        kept = self._evaluate(row)
        if kept is None:
            return NO_VALUE
        return None if kept else FILTERED

    def refusal_of_untyped(self, row: Row) -> Reason | None:
        """Like `refusal`, but a value of a wrong type is a missing one."""
        try:
            return self.refusal(row)
        except WrongTypes:
            return NO_VALUE

    def check(self, row: Row, name: str) -> None:
        """Raises ValueError, one sentence, if a record has values of a wrong type; name: of the record."""
        try:
            self.refusal(row)
        except WrongTypes as error:
            raise ValueError(
                f"source.where is {quoted(self.expression)}, but for {name} {error}; compare numbers with numbers, "
                f"and strings with strings."
            ) from error

    def _compile(self, node: ast.expr, wanted: Literal["condition", "value"]) -> Evaluate:
        if wanted == "condition" and not isinstance(node, ast.BoolOp | ast.UnaryOp | ast.Compare | ast.Name):
            self._refuse(node, "a condition is needed, such as a comparison")
        if isinstance(node, ast.BoolOp):
            return _all_or_any([self._compile(part, "condition") for part in node.values], isinstance(node.op, ast.Or))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return _negated(self._compile(node.operand, "condition"))
        if wanted == "value" and isinstance(node, ast.Compare):
            self._refuse(node, "a value is needed, not a comparison")
        if isinstance(node, ast.Compare):
            return self._comparisons(node)
        value = self._value(node)
        return _condition(value, _text(node)) if wanted == "condition" else value

    def _value(self, node: ast.expr) -> Evaluate:
        if isinstance(node, ast.Name):
            self.columns += [node.id] if node.id not in self.columns else []
            return _column(node.id)
        if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool | int | float | str)):
            return lambda row: node.value
        if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
            return _signed(self._value(node.operand), SIGNS[type(node.op)], _text(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            names = _text(node.left), _text(node.right)
            return _calculated(self._value(node.left), self._value(node.right), ARITHMETIC[type(node.op)], names)
        return self._refuse(node, "this is not allowed")

    def _comparisons(self, node: ast.Compare) -> Evaluate:
        """All of a chain, `a < b < c`."""
        parts, left = [], node.left
        for kind, right in zip(node.ops, node.comparators, strict=True):
            if type(kind) not in COMPARISONS:
                self._refuse(node, "use == and != in place of is")
            parts.append(self._comparison(left, kind, right))
            left = right
        return parts[0] if len(parts) == 1 else _all_or_any(parts, is_any=False)

    def _comparison(self, left: ast.expr, kind: ast.cmpop, right: ast.expr) -> Evaluate:
        sign, compare = COMPARISONS[type(kind)]
        names = _text(left), _text(right)
        if _is_none(left) or _is_none(right):
            if sign not in ("==", "!="):
                self._refuse(left, f"None is compared by {sign}; use == or !=")
            column = self._value(right if _is_none(left) else left)
            return lambda row: (column(row) is None) == (sign == "==")
        one = self._compile(left, "value")
        if sign in ("in", "not in") and isinstance(right, ast.Tuple | ast.List):
            return _listed(one, self._constants(right), compare, names)
        if sign in ("in", "not in") and isinstance(right, ast.Constant) and isinstance(right.value, str):
            item = quoted(right.value)
            self._refuse(
                right, f"{sign} needs a list or a column; write [{item}] or ({item},), or 'part' {sign} column"
            )
        many = self._compile(right, "value")
        return _compared(one, many, sign, compare, names)

    def _constants(self, node: ast.Tuple | ast.List) -> list[Any]:
        values = [_constant(item) for item in node.elts]
        if len({_kind(value) for value in values}) != 1 or _kind(values[0]) not in KINDS:
            self._refuse(node, "a list must have numbers alone, or strings alone")
        return values

    def _refuse(self, node: ast.expr, why: str) -> Any:
        part = ast.get_source_segment(self.expression.strip(), node) or ast.unparse(node)
        raise ValueError(f"source.where is {quoted(self.expression)}, with {quoted(part)}: {why}{_allowed()}")


def quoted(text: str) -> str:
    """A text in quotes, for messages; of a long one, the beginning."""
    return repr(_shortened(text))


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def _text(node: ast.expr) -> str:
    return _shortened(ast.unparse(node))


def _allowed() -> str:
    return f"; it must consist of {ALLOWED}."


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, int | float):
        return NUMBER
    return STRING if isinstance(value, str) else f"a {type(value).__name__}"


def _constant(node: ast.expr) -> Any:
    """The value of a constant, or of a number with a sign; None for anything else."""
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        number = _constant(node.operand)
        return SIGNS[type(node.op)](number) if _kind(number) == NUMBER else None
    return node.value if isinstance(node, ast.Constant) else None


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _column(name: str) -> Evaluate:
    def value(row: Row) -> Any:
        found = row.get(name)
        return None if found != found else found  # NaN

    return value


def _all_or_any(parts: list[Evaluate], is_any: bool) -> Evaluate:
    """`and` and `or` of three values; the one that decides (false; true) wins over an unknown one (None)."""

    def value(row: Row) -> bool | None:
        found = [part(row) for part in parts]
        if is_any in found:
            return is_any
        return None if None in found else not is_any

    return value


def _negated(part: Evaluate) -> Evaluate:
    return lambda row: None if (found := part(row)) is None else not found


def _condition(value: Evaluate, text: str) -> Evaluate:
    """A column of booleans."""

    def condition(row: Row) -> bool | None:
        found = value(row)
        if found is not None and not isinstance(found, bool):
            raise WrongTypes(f"{text} is {_kind(found)} where a condition is needed")
        return found

    return condition


def _compared(left: Evaluate, right: Evaluate, sign: str, compare: Operation, names: Names) -> Evaluate:
    def comparison(row: Row) -> bool | None:
        one, other = left(row), right(row)
        if one is None or other is None:
            return None
        kind = _kind(one)
        if kind != _kind(other) or kind not in ORDERED.get(sign, KINDS):
            raise _mismatch("compares", (one, other), names)
        return compare(one, other)

    return comparison


def _listed(left: Evaluate, values: list[Any], compare: Operation, names: Names) -> Evaluate:
    def comparison(row: Row) -> bool | None:
        one = left(row)
        if one is None:
            return None
        if _kind(one) != _kind(values[0]):
            raise _mismatch("compares", (one, values[0]), (names[0], repr(values[0])))
        return compare(one, values)

    return comparison


def _signed(operand: Evaluate, apply: Callable[[Any], Any], name: str) -> Evaluate:
    def value(row: Row) -> Any:
        one = operand(row)
        if one is None:
            return None
        if _kind(one) != NUMBER:
            raise WrongTypes(f"it puts a sign before {name} ({_kind(one)})")
        return apply(one)

    return value


def _calculated(left: Evaluate, right: Evaluate, calculate: Operation, names: Names) -> Evaluate:
    def value(row: Row) -> Any:
        one, other = left(row), right(row)
        if one is None or other is None:
            return None
        if {_kind(one), _kind(other)} != {NUMBER}:
            raise _mismatch("calculates with", (one, other), names)
        try:
            return calculate(one, other)
        except ArithmeticError:  # a division by zero has no value
            return None

    return value


def _mismatch(what: str, values: tuple[Any, Any], names: Names) -> WrongTypes:
    one, other = (f"{name} ({_kind(value)})" for name, value in zip(names, values, strict=True))
    return WrongTypes(f"it {what} {one} {'with' if what == 'compares' else 'and'} {other}")
