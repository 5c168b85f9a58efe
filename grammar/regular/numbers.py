r"""JSON numbers under constraints: automata that read the texts of a set of numbers.

Constrained numbers are written without exponent: `-?(0|[1-9][0-9]*)(\.[0-9]+)?`. A finite automaton can check every
bound, integrality and multipleOf on such texts. So the sets are regular, exact, and closed under complement. As in JSON
Schema, `1.0` is an integer and `-0` is zero. But integers of more than 15 digits have no fraction part: most readers
make a float of such a text, and beyond 2^53 it is another integer. (A single value that is a float may have one.)
Numbers without any constraint may also have an exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import cache, lru_cache
from itertools import islice
from typing import Any

from ramet.errors import GrammarTooLarge
from ramet.grammar import ir
from ramet.grammar.regular import dfas
from ramet.grammar.regular import languages as regular
from ramet.grammar.regular.dfas import Dfa

_DIGIT = ir.Chars(((48, 57),))
_INTEGER_PART = ir.Choice((ir.text("0"), ir.Concatenation((ir.Chars(((49, 57),)), ir.Repeat(_DIGIT)))))
_FRACTION = ir.Concatenation((ir.text("."), ir.Repeat(_DIGIT, 1)))
_EXPONENT = ir.Concatenation((ir.one_of(["e", "E"]), ir.optional(ir.one_of(["+", "-"])), ir.Repeat(_DIGIT, 1)))
ANY_NUMBER = ir.Concatenation(
    (ir.optional(ir.text("-")), _INTEGER_PART, ir.optional(_FRACTION), ir.optional(_EXPONENT))
)
_PLAIN_INTEGER = ir.Concatenation((ir.optional(ir.text("-")), _INTEGER_PART))
PLAIN_NUMBER = ir.Concatenation((ir.optional(ir.text("-")), _INTEGER_PART, ir.optional(_FRACTION)))

MAX_STATES = 20_000
_LARGE_DIGITS = 16  # integers with so many may be beyond 2^53, where floats are not exact
_TRIED = 12  # values that are tried on each side before an automaton decides whether a set is empty


@dataclass(frozen=True, slots=True)
class Numbers:
    """A set of numbers. All conditions must hold. If `finite` is given, it is the set, and all other fields are at
    defaults.

    integer: True: integers only; False: no integers; None: both. multiples: (divisor, must it divide). plain: True:
    only texts without a fraction part; False: only texts with one (or with an exponent); None: both. This is the only
    field about texts: in draft 4, 1.0 is not an integer.
    """

    low: Fraction | None = None
    low_open: bool = False
    high: Fraction | None = None
    high_open: bool = False
    integer: bool | None = None
    multiples: frozenset[tuple[Fraction, bool]] = frozenset()
    finite: frozenset[Fraction] | None = None
    excluded: frozenset[Fraction] = frozenset()
    plain: bool | None = None

    def contains(self, value: Fraction) -> bool:
        """Tell whether some text of the set has this value."""
        if self.plain and value.denominator != 1:
            return False
        if self.finite is not None:
            return value in self.finite
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            return False
        if self.high is not None and (value > self.high or (self.high_open and value == self.high)):
            return False
        if self.integer is not None and (value.denominator == 1) != self.integer:
            return False
        return value not in self.excluded and all((value % m == 0) == wanted for m, wanted in self.multiples)


ANY = Numbers()


def intersect(a: Numbers, b: Numbers) -> Numbers | None:
    """Return the numbers in both sets; None if the result is seen to be empty."""
    if a is ANY or a == ANY:
        return b
    if b is ANY or b == ANY or a == b:
        return a
    if a.plain is not None and b.plain is not None and a.plain != b.plain:
        return None
    plain = a.plain if a.plain is not None else b.plain
    if a.finite is not None or b.finite is not None:
        if a.finite is None:
            a, b = b, a
        assert a.finite is not None
        kept = frozenset(v for v in a.finite if b.contains(v))
        return Numbers(finite=kept, plain=plain) if kept else None
    if a.integer is not None and b.integer is not None and a.integer != b.integer:
        return None
    low, low_open = _tighter(a.low, a.low_open, b.low, b.low_open, max)
    high, high_open = _tighter(a.high, a.high_open, b.high, b.high_open, min)
    integer = a.integer if a.integer is not None else b.integer
    multiples, excluded = a.multiples | b.multiples, a.excluded | b.excluded
    out = Numbers(low, low_open, high, high_open, integer, multiples, None, excluded, plain)
    return simplify(out)


def simplify(numbers: Numbers) -> Numbers | None:
    """Tighten the bounds, and list the values of a small set; None if the set is empty."""
    if numbers.multiples:
        merged = _merged(numbers)
        if merged is None:
            return None
        numbers = merged
    low, high = numbers.low, numbers.high
    if numbers.integer:
        if low is not None:
            low = Fraction(math.floor(low) + 1) if numbers.low_open else Fraction(math.ceil(low))
        if high is not None:
            high = Fraction(math.ceil(high) - 1) if numbers.high_open else Fraction(math.floor(high))
        numbers = replace(numbers, low=low, low_open=False, high=high, high_open=False)
    if low is not None and high is not None:
        if low > high or (low == high and (numbers.low_open or numbers.high_open)):
            return None
        if low == high:
            return Numbers(finite=frozenset((low,)), plain=numbers.plain) if numbers.contains(low) else None
        if numbers.integer and high - low <= 64:
            found = frozenset(Fraction(v) for v in range(int(low), int(high) + 1) if numbers.contains(Fraction(v)))
            if len(found) < high - low + 1 or high - low <= 8:
                return Numbers(finite=found, plain=numbers.plain) if found else None
    if len(numbers.multiples) and not _has_simple_value(numbers):
        is_empty = completion(numbers, "") is None if is_read_by_value(numbers) else automaton(numbers).is_empty
        if is_empty:
            return None
    return numbers


def _merged(numbers: Numbers) -> Numbers | None:
    """Return the same set with one divisor in place of all that must divide, and without needless ones that must not.

    None if the set is seen to be empty.
    """
    wanted = [m for m, must in numbers.multiples if must] + ([Fraction(1)] if numbers.integer else [])
    whole = None
    for m in wanted:
        whole = m if whole is None else _least_common_multiple(whole, m)
    if numbers.integer is False and whole is not None and whole.denominator == 1:
        return None
    unwanted = [m for m, must in numbers.multiples if not must]
    if whole is not None and any(whole % m == 0 for m in unwanted):
        return None
    kept = {(m, False) for m in unwanted if not any(m != other and m % other == 0 for other in unwanted)}
    if whole is not None and not (numbers.integer and whole == 1):
        kept.add((whole, True))
    return replace(numbers, multiples=frozenset(kept))


def _least_common_multiple(a: Fraction, b: Fraction) -> Fraction:
    return Fraction(math.lcm(a.numerator, b.numerator), math.gcd(a.denominator, b.denominator))


def _has_simple_value(numbers: Numbers) -> bool:
    """Tell whether one of a few values near the lower bound, or near zero, is in the set. It may have others."""
    step = next((m for m, must in numbers.multiples if must), Fraction(1))
    for size in (step,) if numbers.integer is not False else (step, Fraction(1, 2), Fraction(1, 10)):
        if numbers.low is not None:
            first = math.ceil(numbers.low / size)
        else:
            first = -_TRIED if numbers.high is None else math.floor(numbers.high / size) - _TRIED
        if any(numbers.contains(k * size) for k in range(first, first + 2 * _TRIED + 1)):
            return True
    return False


def some(numbers: Numbers, count: int) -> list[Fraction]:
    """Return up to `count` of the numbers, with short texts. There may be more."""
    if numbers.plain is False:
        return []
    if numbers.finite is not None:
        return sorted(numbers.finite)[:count]
    step = next(
        (m for m, must in numbers.multiples if must), Fraction(1) if numbers.integer is not False else Fraction(1, 8)
    )
    if numbers.low is not None and (numbers.low > 0 or numbers.high is None):
        first, sign = math.ceil(numbers.low / step), 1
    elif numbers.high is not None and numbers.high < 0:
        first, sign = math.floor(numbers.high / step), -1
    else:
        first, sign = 0, 1 if numbers.high is None or numbers.high > 0 else -1
    tried = ((first + sign * k) * step for k in range(4 * count))
    return list(islice((x for x in tried if numbers.contains(x)), count))


def _tighter(
    a: Fraction | None, a_open: bool, b: Fraction | None, b_open: bool, pick: Callable[[Fraction, Fraction], Fraction]
) -> tuple[Fraction | None, bool]:
    if a is None:
        return b, b_open
    if b is None:
        return a, a_open
    if a == b:
        return a, a_open or b_open
    return (a, a_open) if pick(a, b) == a else (b, b_open)


def complement(numbers: Numbers) -> list[Numbers]:
    """Return all other numbers, as a union."""
    out = [] if numbers.plain is None else [Numbers(plain=not numbers.plain)]
    if numbers.finite is not None:
        return [*out, Numbers(excluded=numbers.finite)]
    if numbers.low is not None:
        out.append(Numbers(high=numbers.low, high_open=not numbers.low_open))
    if numbers.high is not None:
        out.append(Numbers(low=numbers.high, low_open=not numbers.high_open))
    if numbers.integer is not None:
        out.append(Numbers(integer=not numbers.integer))
    out.extend(Numbers(multiples=frozenset(((m, not wanted),))) for m, wanted in numbers.multiples)
    if numbers.excluded:
        out.append(Numbers(finite=numbers.excluded))
    return out


@lru_cache(maxsize=4096)
def automaton(numbers: Numbers) -> Dfa:
    """Return the automaton over bytes of the texts of these numbers.

    Raises: GrammarTooLarge for divisors that need too many states.
    """
    if numbers == ANY:
        return regular.compile_bytes(ANY_NUMBER)
    if numbers.plain is False or (numbers.plain and numbers.finite is not None):
        base, plain = automaton(replace(numbers, plain=None)), _plain_integers()
        return dfas.intersect([base, plain if numbers.plain else dfas.complement(plain)])
    if numbers.finite is not None:
        return _listed(numbers.finite, is_exact=True)
    base = unexcluded(numbers)
    if numbers.excluded:
        base = dfas.intersect([base, dfas.complement(_listed(numbers.excluded, is_exact=False))])
    return _exact(base) if numbers.integer and not numbers.plain else base


def _listed(values: frozenset[Fraction], *, is_exact: bool) -> Dfa:
    """Return the automaton of the texts of some values. is_exact: large integers have no fraction part."""
    return regular.compile_bytes(ir.Choice(tuple(_texts_of(v, is_exact=is_exact) for v in sorted(values))))


def _exact(dfa: Dfa) -> Dfa:
    """Remove the texts of large integers with a fraction part; if that needs too many states, all with one."""
    is_large = len(dfa.transitions) * (_LARGE_DIGITS + 4) > MAX_STATES
    return dfas.intersect([dfa, _plain_integers() if is_large else _exact_integers()])


@cache
def _plain_integers() -> Dfa:
    return regular.compile_bytes(_PLAIN_INTEGER)


@cache
def _exact_integers() -> Dfa:
    small = ir.Concatenation((ir.optional(ir.text("-")), ir.Repeat(_DIGIT, 1, _LARGE_DIGITS - 1), _FRACTION))
    return dfas.union([_plain_integers(), regular.compile_bytes(small)])


def unexcluded(numbers: Numbers) -> Dfa:
    """Do as `automaton`, but without exponents, and with the single excluded numbers put back."""
    return _track(replace(numbers, excluded=frozenset()))


def divisors_text(numbers: Numbers) -> str:
    return " and ".join(decimal_text(m) for m, _ in sorted(numbers.multiples))


# --- sets whose automaton has too many states: texts are looked at one by one

_LARGE_DIVISOR = 1000  # its automaton takes longer to make than a text takes to read without one
_MAX_SKIPPED = 256  # multiples that are no members because of other conditions, one after the other


def is_read_by_value(numbers: Numbers) -> bool:
    """Tell whether a text is to be checked by `completion`, because a divisor is so large that an automaton is not
    worth its states.
    """
    if numbers.finite is not None or numbers.plain is False:
        return False
    return any(must and _Divisor(m).q > _LARGE_DIVISOR for m, must in numbers.multiples)


def symbols_after(text: str) -> str:
    """Return the symbols that may follow a beginning of a number's text, whatever the number is."""
    digits = text.lstrip("-")
    if not digits:
        return "0123456789" if text else "0123456789-"
    if "." in digits:
        return "0123456789"
    return "." if digits == "0" else "0123456789."


def is_text_of(numbers: Numbers, text: str) -> bool:
    """Tell whether a beginning of a number's text is the text of a number in the set."""
    whole, point, part = text.lstrip("-").partition(".")
    if not whole or (point and not part) or (point and not _may_have_fraction(numbers, whole)):
        return False
    return numbers.contains(Fraction(text))


def may_go_on(numbers: Numbers, text: str) -> bool:
    """Tell whether `completion` finds a text, without a search where that is possible."""
    whole, point, part = text.lstrip("-").partition(".")
    low, high = numbers.low, numbers.high
    if text.startswith("-"):  # of absolute values
        low, high = None if high is None else -high, None if low is None else -low
    if not point and high is None and whole not in ("", "0"):
        return True
    if point and numbers.integer:
        return not part.strip("0") and is_text_of(numbers, text.partition(".")[0] + ".0")
    ((divisor, _), *others) = numbers.multiples
    free = replace(numbers, low=None, high=None, low_open=False, high_open=False, integer=None)
    if others or free != Numbers(multiples=numbers.multiples) or not whole:
        return completion(numbers, text) is not None
    if point and numbers == free:
        # in units of the last decimal of the divisor or of the text: some multiple is among the numbers that begin so
        decimals: int = max(_Divisor(divisor).scale, len(part))
        unit = int(10 ** (decimals - len(part)))
        return -int(whole + part) * unit % int(divisor * 10**decimals) < unit
    if not point and numbers.integer and divisor.denominator == 1 and high is not None:
        least, most, step, begin = max(int(low or 0), 0), int(high), int(divisor), int(whole)
        for size in (10**n for n in range(1 if begin == 0 else len(str(most)) - len(whole) + 1)):
            first = -(-max(begin * size, least) // step) * step
            if first < (begin + 1) * size and first <= most:
                return True
        return False
    return completion(numbers, text) is not None


def completion(numbers: Numbers, text: str) -> str | None:
    """Return a short text that makes a beginning of a number's text a text of the set; None if there is none.

    text: sign, digits and a point, as far as they are read. The set has a divisor that must divide. So only its
    multiples are tried, in the intervals of all numbers whose texts begin in this way.

    Raises: GrammarTooLarge if other conditions exclude too many multiples.
    """
    if is_text_of(numbers, text):
        return ""
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    if not digits:
        ways = [completion(numbers, text + digit) for digit in "0123456789"]
        found = [digit + way for digit, way in zip("0123456789", ways, strict=True) if way is not None]
        if not sign:
            way = completion(numbers, "-")
            found += [] if way is None else ["-" + way]
        return min(found, key=len, default=None)
    whole, point, part = digits.partition(".")
    if point:
        if not _may_have_fraction(numbers, whole):
            return None
        unit = Fraction(1, 10 ** len(part))
        value = _member(numbers, sign, Fraction(int(whole + part)) * unit, unit)
        return None if value is None else _rest(value, digits)
    step = next(m for m, must in numbers.multiples if must)
    bounds = [abs(b) for b in (numbers.low, numbers.high, step) if b is not None]
    most = 0 if whole == "0" else max(len(str(int(b))) for b in bounds) + 3
    for more in range(most + 1):
        value = _member(numbers, sign, Fraction(int(whole) * 10**more), Fraction(10**more))
        if value is not None:
            return _rest(value, digits)
    return None


def _may_have_fraction(numbers: Numbers, whole: str) -> bool:
    return not numbers.plain and not (numbers.integer and len(whole) >= _LARGE_DIGITS)


def _member(numbers: Numbers, sign: str, low: Fraction, size: Fraction) -> Fraction | None:
    """Return the least absolute value in [low, low + size) of a number in the set with this sign."""
    step = next(m for m, must in numbers.multiples if must)
    first, end = low, low + size
    for bound in (numbers.low,) if not sign else (numbers.high,):
        if bound is not None:
            first = max(first, -bound if sign else bound)
    value = math.ceil(first / step) * step
    for _ in range(_MAX_SKIPPED):
        beyond = numbers.high if not sign else None if numbers.low is None else -numbers.low
        if value >= end or (beyond is not None and value > beyond):
            return None
        if numbers.contains(-value if sign else value):
            text = decimal_text(value)
            if "." not in text or _may_have_fraction(numbers, text.partition(".")[0]):
                return value
        value += step
    raise GrammarTooLarge(
        f"of the multiples of {decimal_text(step)}, more than {_MAX_SKIPPED:,} in a row are excluded; "
        "fewer conditions beside it would do"
    )


def _rest(value: Fraction, digits: str) -> str:
    """Return what follows `digits` in the text of an absolute value that begins with them, up to zeros at its end."""
    text = decimal_text(value)
    if "." in digits:
        text = (text if "." in text else text + ".").ljust(max(len(digits), digits.index(".") + 2), "0")
    assert text.startswith(digits), (value, digits)
    return text[len(digits) :]


def decimal_text(value: Fraction) -> str:
    """Return the shortest text of a number without exponent."""
    sign, value = ("-", -value) if value < 0 else ("", value)
    digits = 0
    denominator = value.denominator
    while denominator % 10 == 0:
        denominator //= 10
        digits += 1
    while denominator != 1:
        factor = 2 if denominator % 2 == 0 else 5
        if denominator % factor:
            raise ValueError(f"{value} has no finite decimal form")
        denominator //= factor
        digits += 1
    while True:
        scaled = value * 10**digits
        if scaled.denominator == 1:
            break
        digits += 1
    text = str(int(scaled)).rjust(digits + 1, "0")
    text = text[: len(text) - digits] + ("." + text[len(text) - digits :] if digits else "")
    return sign + (text.rstrip("0").rstrip(".") if "." in text else text)


def _texts_of(value: Fraction, *, is_exact: bool) -> ir.Node:
    text = decimal_text(value)
    if is_exact and value.denominator == 1 and len(text.lstrip("-")) >= _LARGE_DIGITS and not _is_float(value):
        return ir.text(text)
    zeros = ir.Repeat(ir.text("0"))
    tail = zeros if "." in text else ir.optional(ir.Concatenation((ir.text(".0"), zeros)))
    sign = ir.optional(ir.text("-")) if value == 0 else ir.EMPTY
    return ir.Concatenation((sign, ir.text(text), tail))


def _is_float(value: Fraction) -> bool:
    """Tell whether a reader that makes a float of the number gets this value."""
    return abs(value) < 1 << 1023 and Fraction(float(value)) == value


# --- ranges and divisors: a product of small trackers, explored from the start --------------------------------------


_State = tuple[Any, ...]  # see `_Tracks`: the types of its parts depend on the phase


class _Bound:
    """Compares the absolute value of a text with a decimal bound, digit by digit."""

    def __init__(self, bound: Fraction) -> None:
        text = decimal_text(bound)
        self.whole, _, self.part = text.partition(".")

    def digit(self, state: tuple[int, int], digit: int) -> tuple[int, int]:
        """Return the state after a digit of the integer part: (digits read, comparison so far)."""
        count, sign = state
        if count < len(self.whole) and sign == 0:
            own = int(self.whole[count])
            sign = (digit > own) - (digit < own)
        return min(count + 1, len(self.whole) + 1), sign

    def point(self, state: tuple[int, int]) -> tuple[int, int]:
        """Return the state after the integer part: (fraction digits read, comparison so far)."""
        count, sign = state
        if count < len(self.whole):
            sign = -1
        elif count > len(self.whole):
            sign = 1
        return 0, sign

    def fraction(self, state: tuple[int, int], digit: int) -> tuple[int, int]:
        count, sign = state
        if sign == 0:
            own = int(self.part[count]) if count < len(self.part) else 0
            sign = (digit > own) - (digit < own)
        return (min(count + 1, len(self.part)), sign) if sign == 0 else (0, sign)

    def compare(self, state: tuple[int, int]) -> int:
        """Return the result of the comparison at the end of the text. Called after `point`."""
        count, sign = state
        return -1 if sign == 0 and count < len(self.part) else sign


class _Divisor:
    """The remainder of a text by a divisor p / 10^s = q * 10^k / 10^s, where q is not divisible by 10."""

    def __init__(self, divisor: Fraction) -> None:
        text = decimal_text(divisor)
        whole, _, part = text.partition(".")
        self.scale = len(part)
        number = int(whole + part)
        self.zeros = 0
        while number % 10 == 0:
            number //= 10
            self.zeros += 1
        self.q = number

    def push(self, state: tuple[int, int], digit: int) -> tuple[int, int]:
        """Return the state after one more digit.

        A state: (remainder without its trailing zeros, number of those zeros, at most `zeros`).
        """
        rest, trailing = state
        if digit == 0:
            if trailing < self.zeros:
                return rest, trailing + 1
            return rest * 10 % self.q, trailing
        return (rest * 10 ** (trailing + 1) + digit) % self.q, 0

    def divides(self, state: tuple[int, int], pushed: int, broken: bool) -> bool:
        """Tell whether the number read so far is a multiple of the divisor.

        pushed: fraction digits read so far, at most `scale`. broken: a later digit is not zero.
        """
        if broken:
            return False
        for _ in range(self.scale - pushed):
            state = self.push(state, 0)
        return state == (0, self.zeros)  # the number zero starts with all its zeros, see `start`

    def start(self) -> tuple[int, int]:
        return 0, self.zeros


def _intervals(numbers: Numbers) -> dict[str, tuple[Fraction | None, bool, Fraction | None, bool] | None]:
    """Return the interval of absolute values for each sign; None if no number with that sign is in range."""
    low, high = numbers.low, numbers.high
    positive = (low, numbers.low_open, high, numbers.high_open)
    negative = (None if high is None else -high, numbers.high_open, None if low is None else -low, numbers.low_open)
    out: dict[str, tuple[Fraction | None, bool, Fraction | None, bool] | None] = {}
    for sign, (a, a_open, b, b_open) in (("+", positive), ("-", negative)):
        if b is not None and (b < 0 or (b == 0 and b_open)):
            out[sign] = None
        else:
            out[sign] = (a, a_open, b, b_open) if a is not None and a >= 0 else (None, False, b, b_open)
    return out


class _Tracks:
    """The product of all trackers of a set of numbers. Symbols: 0-9 are digits, then the point, then the minus.

    A state: (phase, sign, low state, high state, is a fraction digit not zero, (state, pushed, broken) per divisor).
    """

    first: _State = ("start",)

    def __init__(self, numbers: Numbers) -> None:
        self.integer = numbers.integer
        self.plain = numbers.plain
        self.sides = {}
        for sign, interval in _intervals(numbers).items():
            if interval is not None:
                low, _, high, _ = interval
                bounds = None if low is None else _Bound(low), None if high is None else _Bound(high)
                self.sides[sign] = (interval, *bounds)
        self.is_symmetric = numbers.low is None and numbers.high is None  # then the sign need not be remembered
        self.divisors = [(_Divisor(m), wanted) for m, wanted in sorted(numbers.multiples)]
        bounds_of_all = [b for _, *bounds in self.sides.values() for b in bounds if b is not None]
        self.alike = _alike_digits(bounds_of_all, bool(self.divisors))

    def after(self, state: _State, symbol: int) -> _State | None:
        """Return the state after a symbol; None if no number of the set continues with it."""
        phase = state[0]
        if phase in ("start", "minus"):
            if symbol == 11:
                return ("minus",) if phase == "start" and "-" in self.sides else None
            return self._first_digit("-" if phase == "minus" else "+", symbol) if symbol < 10 else None
        _, sign, a, b, odd, parts = state
        _, low, high = self.sides[sign]
        if symbol == 10:
            if self.plain or phase not in ("zero", "int") or not self._may_divide(parts):
                return None
            return ("point", sign, low and low.point(a), high and high.point(b), odd, parts)
        if symbol == 11 or phase == "zero":
            return None
        if phase == "int":
            moved = tuple((d.push(s, symbol), 0, False) for (d, _), (s, _, _) in zip(self.divisors, parts, strict=True))
            return ("int", sign, low and low.digit(a, symbol), high and high.digit(b, symbol), odd, moved)
        pushed = []
        for (d, _), (s, count, broken) in zip(self.divisors, parts, strict=True):
            if count < d.scale:
                pushed.append((d.push(s, symbol), count + 1, broken))
            else:
                pushed.append((s, count, broken or symbol != 0))
        nonzero = self.integer is not None and (odd or symbol != 0)
        if (nonzero and self.integer) or not self._may_divide(tuple(pushed)):
            return None
        return (
            "frac",
            sign,
            low and low.fraction(a, symbol),
            high and high.fraction(b, symbol),
            nonzero,
            tuple(pushed),
        )

    def _may_divide(self, parts: tuple[Any, ...]) -> bool:
        """Tell whether the divisors that must divide still may, whatever fraction digits follow."""
        for (d, wanted), (s, count, broken) in zip(self.divisors, parts, strict=True):
            if wanted and (broken or (count == d.scale and s != (0, d.zeros))):
                return False
        return True

    def _first_digit(self, sign: str, digit: int) -> _State | None:
        if sign not in self.sides:
            return None
        if self.is_symmetric:
            sign = "+"
        _, low, high = self.sides[sign]
        return (
            "zero" if digit == 0 else "int",
            sign,
            None if low is None else low.digit((0, 0), digit),
            None if high is None else high.digit((0, 0), digit),
            False,
            tuple((d.push(d.start(), digit), 0, False) for d, _ in self.divisors),
        )

    def accepts(self, state: _State) -> bool:
        """Tell whether a number that ends in this state is in the set."""
        if state[0] in ("start", "minus", "point"):
            return False
        phase, sign, a, b, odd, parts = state
        (_, low_open, _, high_open), low, high = self.sides[sign]
        if phase in ("zero", "int"):
            a, b = low and low.point(a), high and high.point(b)
        if low is not None:
            c = low.compare(a)
            if c < 0 or (c == 0 and low_open):
                return False
        if high is not None:
            c = high.compare(b)
            if c > 0 or (c == 0 and high_open):
                return False
        if self.integer is not None and self.integer == bool(odd):
            return False
        return all(d.divides(*part) == wanted for (d, wanted), part in zip(self.divisors, parts, strict=True))


def _track(numbers: Numbers) -> Dfa:
    """Build the automaton: explore the product of the trackers from the start."""
    tracks = _Tracks(numbers)
    index, queue, rows = {tracks.first: 0}, [tracks.first], []
    for state in queue:
        row: list[int] = []
        for symbol in range(12):
            if symbol < 10 and tracks.alike[symbol] < symbol:
                row.append(row[tracks.alike[symbol]])
                continue
            found = tracks.after(state, symbol)
            if found is None:
                row.append(-1)
                continue
            number = index.get(found)
            if number is None:
                number = index[found] = len(queue)
                queue.append(found)
                if len(queue) > MAX_STATES:
                    raise GrammarTooLarge(
                        f"multipleOf {divisors_text(numbers)} needs more than {MAX_STATES:,} automaton states; "
                        "a divisor with fewer digits would do"
                    )
            row.append(number)
        rows.append([-1, *row])
    starts = [0, 45, 46, 47, *range(48, 59)]
    classes = [0, 12, 11, 0, *range(1, 11), 0]
    return dfas.minimize(Dfa(dfas.BYTE_MAX, starts, classes, 13, rows, [tracks.accepts(s) for s in queue]))


def _alike_digits(bounds: list[_Bound], has_divisors: bool) -> list[int]:
    """Return for each digit the smallest digit that all trackers treat like it.

    Zero and the digits of the bounds stay separate. The digits between them are alike.
    """
    if has_divisors:
        return list(range(10))
    own = {0, *(int(digit) for b in bounds for digit in b.whole + b.part)}
    return [max(d for d in range(digit + 1) if d in own or d - 1 in own) for digit in range(10)]


def fraction(value: float | int) -> Fraction:
    """Return the decimal number that the text of a JSON number had. Numbers too large for a float are Python's inf."""
    if isinstance(value, float) and math.isinf(value):
        return Fraction(int(math.copysign(1, value)) << 1024)
    return Fraction(value) if isinstance(value, int) else Fraction(Decimal(repr(value)))
