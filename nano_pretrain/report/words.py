"""Numbers as people read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from math import isfinite, nan

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
NOT_KNOWN = "not recorded"


def count(value: float) -> str:
    """Tokens or parameters with three digits: 3.28M."""
    if not isfinite(value):
        return NOT_KNOWN
    for unit, letter in _UNITS:
        # 999,950 would be rounded to 1000K.
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def decimal(value: float, digits: int = 3) -> str:
    """A fixed number of digits after the point."""
    return f"{value:.{digits}f}" if isfinite(value) else NOT_KNOWN


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction of 1 in percent."""
    return f"{100 * fraction:.{digits}f} %" if isfinite(fraction) else NOT_KNOWN


def small_share(fraction: float) -> str:
    """A fraction of 1 in percent, two digits of it however small it is: 0.00013 %."""
    if not isfinite(fraction) or fraction == 0:
        return percent(fraction, 0)
    return f"{100 * fraction:.2g} %" if abs(fraction) < 0.01 else percent(fraction, 2)


def change(value: float, reference: float) -> float:
    """How far a value lies above (positive) or below its reference, as a fraction of it; NaN without a reference."""
    return value / reference - 1 if reference else nan


def duration(seconds: float) -> str:
    """Days, hours, minutes and seconds, down to whole seconds."""
    return str(timedelta(seconds=round(seconds))) if abs(seconds) < 1e13 else NOT_KNOWN


def moment(value: object) -> str:
    """A time stamp: seconds since 1970 as UTC, text as it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e11:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return str(value) if value else ""
