#!/usr/bin/env python3
"""Compare two results of `rnnlm-kernels bench`, for instance before and after a change.

    python benchmarks/compare.py OLD.json NEW.json

Prints old and new medians and how many times faster the new one is. Only measurements of the same
problem, thread count and backend are compared; whether the machines were the same is said, not
enforced. The rival is compared as well: when it changed too, the machine did.
"""

from __future__ import annotations

import argparse
import sys

from rnnlm_kernels.bench.report import format_time
from rnnlm_kernels.bench.results import Measurement, Results, geomean


def keyed(results: Results) -> dict[tuple[object, ...], Measurement]:
    return {(m.workload, m.threads, m.contender): m for m in results.measurements if m.median_us}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="a result JSON")
    parser.add_argument("new", help="a result JSON")
    arguments = parser.parse_args()
    try:
        old, new = Results.load(arguments.old), Results.load(arguments.new)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if old.machine != new.machine:
        print("warning: the two results come from different machines")
    before, after = keyed(old), keyed(new)
    speedups: dict[str, list[float]] = {}
    for key, m in after.items():
        if key not in before:
            continue
        was, now = before[key].median_us, m.median_us
        if was is None or now is None:
            continue
        speedups.setdefault(m.contender, []).append(was / now)
        print(
            f"{m.workload.label:36} {m.workload.mode:10} {m.contender:14} t={m.threads:<3}"
            f" {format_time(was):>9} -> {format_time(now):>9}  {was / now:5.2f}x"
        )
    if not speedups:
        print("error: the two results have no measurement in common", file=sys.stderr)
        return 2
    for contender, values in speedups.items():
        print(f"{contender}: {geomean(values):.2f}x in the geometric mean of {len(values)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
