"""Numbers behind the lines: smoothing, and thinning to what a picture can show."""

from __future__ import annotations

import numpy as np

from nano_pretrain.report.record import Floats

POINTS = 3_000
"""Points of a line; about two a pixel."""


def window(steps: int) -> int:
    """Steps that are averaged into one smoothed value: a fiftieth of the run, odd, at least 5."""
    return max(5, steps // 50 | 1)


def smooth(values: Floats, width: int) -> Floats:
    """Centred moving average over `width` steps, narrower at both ends; values that are not finite are left out.

    Where a whole window holds none, the result is NaN.
    """
    if len(values) == 0:
        return values
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - width // 2, 0), np.minimum(centre + width // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most about `POINTS` points that keep the smallest and the largest y of every stretch, so no spike is lost."""
    if len(x) <= POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(x)), POINTS // 2)
    filled_low, filled_high = (np.where(np.isfinite(y), y, fill) for fill in (np.inf, -np.inf))
    kept = {int(part[filled_low[part].argmin()]) for part in stretches}
    kept |= {int(part[filled_high[part].argmax()]) for part in stretches}
    chosen = np.array(sorted(kept | {0, len(x) - 1}))
    return x[chosen], y[chosen]


def median(values: Floats) -> float:
    """Median of the finite values; NaN when there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")
