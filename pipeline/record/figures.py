"""How the report writes numbers."""

from typing import Any

from pipeline.record.runs import number


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage, with more digits where one would leave a single figure."""
    value = number(value)
    if value is None:
        return "–"
    return f"{100 * value:.{digits if value == 0 or abs(value) >= 0.01 else digits + 1}f} %"


def count(value: Any) -> str:
    """A whole number with thin spaces between thousands; from ten million on in millions."""
    value = number(value)
    if value is None:
        return "–"
    return f"{value / 1e6:,.1f} M" if abs(value) >= 1e7 else f"{value:,.0f}".replace(",", "\u202f")


def seconds(value: Any) -> str:
    """Wall time in the unit that reads best."""
    value = number(value)
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min" if value < 36000 else f"{value / 3600:.1f} h"
