r"""Numbers as answers write them: `4.5e33`, `4.5 \times 10^{33}`, `10\,080`, `2\frac{1}{2}`, `50\%`
and `12\text{ cm}`; and when two of them are equal.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 5000  # larger powers are not worked out
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_POWER = r"\{?10\}?\s*\^\s*(?:\{\s*([+-]?\s*\d+)\s*\}|([+-]?\d+))"
_E = r"(?:[eE]|\s*\\text\{\s*[eE]\s*\}\s*)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<currency>[$\u20ac\u00a3\u00a5]?)\s*(?P<sign2>-?)\s*(?:"
    rf"(?P<whole>\d+)\s*\\frac\s*(?:\{{(?P<mn>\d+)\}}|(?P<mn1>\d))\s*"
    r"(?:\{(?P<md>\d+)\}|(?P<md1>\d))"
    r"|(?P<whole2>\d+)\s+(?P<mn2>\d+)/(?P<md2>\d+)"
    rf"|\\frac\s*(?:\{{\s*(?P<n>-?{_DECIMAL})\s*\}}|(?P<n1>\d))\s*"
    rf"(?:\{{\s*(?P<d>{_DECIMAL})\s*\}}|(?P<d1>\d))"
    rf"|(?P<n2>{_DECIMAL})\s*/\s*(?P<d2>{_DECIMAL})(?![.\d])"
    r"|(?P<lead>\d*\.\d*)\\(?:overline|bar)\s*\{?(?P<period>\d+)\}?"
    rf"|(?P<q>{_POWER})"
    rf"|(?P<mantissa>{_DECIMAL})(?:{_E}(?P<e>[+-]?\d+)(?![.\d])"
    rf"|\s*(?:\\times|\\cdot|\*|x|X)\s*(?P<p>{_POWER}))?"
    r")"
)
_E_NOTATION = re.compile(
    r"(?<![A-Za-z0-9.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\.?\d|[A-Za-z^])", re.ASCII
)
_UNIT_NAMES = {
    "m": "m metre metres meter meters",
    "cm": "cm centimetre centimetres centimeter centimeters",
    "mm": "mm millimetre millimetres millimeter millimeters",
    "km": "km kilometre kilometres kilometer kilometers",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "day": "day days",
    "ft": "ft foot feet",
    "in": "inch inches",
}
_SAME_UNIT = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_UNIT_SYMBOLS = (
    "C K J N W V A L T Hz kHz MHz GHz eV keV MeV GeV kJ mJ kW MW mV kV mA pc kpc Mpc AU nm pm ms "
    "ns Pa kPa MPa mol rad sr lb lbs oz mph mL ml dB erg ergs ly yr yrs amu kN mg"
)
_SYMBOLS = {*_SAME_UNIT, *_UNIT_SYMBOLS.split()}
_PAIRS = {"J s", "N m", "W h", "A s", "V s", "C m"}
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_FUNCTIONS = "and or not sqrt log exp sin cos tan cot sec csc arcsin arccos arctan mod"
_NOT_UNITS = {*_FUNCTIONS.split()}


@dataclass(frozen=True)
class Quantity:
    """A written number. rounded: it has a decimal point or a power of ten; scientific: a power.

    unit: as written; "" for none, and for degrees and currencies.
    """

    value: Fraction
    rounded: bool
    scientific: bool
    percent: bool
    unit: str


_UNIT = r"(?:\\text\{\s*)?([A-Za-z]+)\s*\}?(\^\{?[23]\}?)?"
_UNIT_FRACTION = re.compile(rf"\s*\\frac\s*\{{\s*{_UNIT}\s*\}}\s*\{{\s*{_UNIT}\s*\}}\Z")


def _in_a_line(match: re.Match[str]) -> str:
    """m/s for \\frac{m}{s}, of known symbols only."""
    above, above_power, below, below_power = match.groups(default="")
    if not {above, below} <= _SYMBOLS:
        return match[0]
    return f" {above}{above_power}/{below}{below_power}"


def read_quantity(text: str) -> Quantity | None:
    """The number that `text`, tidied, is, with its unit; None for any other text."""
    text = _UNIT_FRACTION.sub(_in_a_line, text)
    match = _NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    spaced, rest = rest[:1] == " " or text[match.end() - 1] == " ", rest.strip()
    percent = re.fullmatch(r"\\?%|percent|\\text\{\s*(?:percent|\\?%)\s*\}", rest) is not None
    unit = "" if percent else _unit(rest, spaced)
    parts = {name: part for name, part in match.groupdict().items() if part}
    value = None if unit is None else _value(parts)
    if value is None or unit is None:
        return None
    words = unit.split()
    if words and words[0] in _SCALES:
        value, unit = value * _SCALES[words[0]], " ".join(words[1:])
    scientific = any(name in parts for name in ("e", "p", "q"))
    rounded = scientific or "." in parts.get("mantissa", "") or "." in parts.get("n", "")
    return Quantity(value, rounded, scientific, percent, unit)


def equal_quantities(gold: Quantity, answer: Quantity) -> bool:
    """Equal values, in the same unit where both name a known one. A percentage is its number or a
    hundredth of it, as the other side has it.
    """
    units = [_SAME_UNIT.get(quantity.unit) for quantity in (gold, answer)]
    if None not in units and units[0] != units[1]:
        return False
    rounded = gold.rounded or answer.rounded
    scientific = gold.scientific or answer.scientific
    pairs = [(gold.value, answer.value)]
    if gold.percent != answer.percent:
        pairs.append(
            (gold.value / 100, answer.value) if gold.percent else (gold.value, answer.value / 100)
        )
    return any(nearly_equal(a, b, scientific=scientific) if rounded else a == b for a, b in pairs)


def nearly_equal(a: Fraction, b: Fraction, *, scientific: bool) -> bool:
    """Equal to six digits where a power of ten is written, else to six decimal places; small
    numbers to six digits in either case.
    """
    difference = abs(a - b)
    size = abs(a) if abs(a) > abs(b) else abs(b)
    limit = Fraction(1, 10**6)
    if scientific:
        return difference <= limit * size
    return difference <= (limit / 2 if size >= Fraction(1, 1000) else 0) or (
        difference <= limit * (size if size < 1 else 1)
    )


def without_e_notation(text: str) -> str:
    r"""`text` with `4.5e33` written as `4.5 \times 10^{33}`, for a parser to which e is Euler's."""
    return _E_NOTATION.sub(lambda m: rf"({m[1]} \times 10^{{{int(m[2])}}})", text)


def _value(parts: dict[str, str]) -> Fraction | None:
    def number(*names: str) -> Fraction:
        digits = next(parts[name] for name in names if name in parts)
        return Fraction(re.sub(r"[, ]|\.$", "", digits))

    try:
        if "whole" in parts or "whole2" in parts:
            numerator, denominator = number("mn", "mn1", "mn2"), number("md", "md1", "md2")
            if numerator >= denominator:
                return None  # a product, not a mixed number
            value = number("whole", "whole2") + numerator / denominator
        elif "period" in parts:
            value = _repeating(parts["lead"], parts["period"])
        elif {"d", "d1", "d2"} & parts.keys():
            value = number("n", "n1", "n2") / number("d", "d1", "d2")
        else:
            value = number("mantissa") if "mantissa" in parts else Fraction(1)
            power = parts.get("e") or parts.get("p") or parts.get("q") or "0"
            exponent = int(re.sub(r"\{?10\}?\s*\^|[{}\s]", "", power))
            if abs(exponent) > MAX_EXPONENT:
                return None
            value *= Fraction(10) ** exponent
    except (ValueError, ZeroDivisionError):  # too many digits for int(), or n / 0
        return None
    is_negative = parts.get("sign") == "-" or "sign2" in parts
    return -value if is_negative else value


def _repeating(lead: str, period: str) -> Fraction:
    places = len(lead.partition(".")[2])
    head = Fraction(lead.rstrip(".") or 0) if lead != "." else Fraction(0)
    return head + Fraction(int(period), (10 ** len(period) - 1) * 10**places)


def _unit(rest: str, spaced: bool) -> str | None:
    r"""The unit that follows a number; None where what follows is no unit. A single letter is one
    after a space only, and then a known one: `5 m`, but not `5m` or `5 x`.
    """
    if re.fullmatch(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|degrees?)?(?:\s*\\?text\{\s*\})*", rest):
        return ""
    had_text = "\\text{" in rest
    words = re.sub(r"\\text\{([^{}0-9]*)\}", r" \1 ", rest)
    words = re.sub(r"\^\s*(?:\{\s*-?\d+\s*\}|-?\d|\{?\\circ\}?)", "", words)
    words = re.sub(r"[MLR]_\{?\s*\\odot\s*\}?|\\AA|\\Omega|\\mu(?![a-z])", " unit ", words)
    words = re.sub(r"\\cdot|[/().,*\s-]|\\%", " ", words)
    tokens = words.split()
    if not tokens or not all(token.replace("'", "").isalpha() for token in tokens):
        return None
    if set(tokens) & _NOT_UNITS:
        return None
    if had_text:
        return " ".join(tokens)
    if "\\circ" in rest and tokens in (["C"], ["F"]):
        return tokens[0]
    if not (spaced or (tokens[0] in _SYMBOLS and (len(tokens[0]) > 1 or "/" in rest))):
        return None
    letters = [token for token in tokens if len(token) == 1]
    if len(letters) > 1 and not re.search(r"[/^]", rest) and " ".join(letters) not in _PAIRS:
        return None  # `3 m g` is a product
    is_unit = all(token in _SYMBOLS or len(token) >= 3 for token in tokens)
    return " ".join(tokens) if is_unit else None
