"""Samples and what is said about them.

What is compared is measured in turns (A B A B ...), so that whatever else the machine does falls on both alike.
"""

import statistics

from rig import say


def percentile(samples, share):
    """The nearest-rank percentile."""
    ordered = sorted(samples)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def summary(samples):
    """Median, 95th percentile, count, extremes and the distance between the quartiles."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {
        "median": statistics.median(samples),
        "p95": percentile(samples, 95),
        "min": min(samples),
        "max": max(samples),
        "iqr": quartiles[2] - quartiles[0],
        "n": len(samples),
    }


def in_turns(sides, count, warm_up=0, what=""):
    """Calls each side `count` times, in turns; gives the samples of each. The first `warm_up` rounds do not count."""
    samples = {name: [] for name in sides}
    for turn in range(warm_up + count):
        for name, measure in sides.items():
            value = measure()
            if turn >= warm_up:
                samples[name].append(value)
        if what and turn >= warm_up and (turn + 1 - warm_up) % max(1, count // 4) == 0:
            say(f"  {what}: {turn + 1 - warm_up} of {count}")
    return samples
