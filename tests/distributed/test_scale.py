"""On thousands of ranks: as many collectives as dimensions that shard, of about 200 bytes."""

import csv
import math
import sys
from pathlib import Path

from pairwise import ALL_COMBINATIONS
from processes import alone

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def counted_on(layouts):
    """Count in a process that is one of thousands, as far as it can see."""
    sys.path.insert(0, str(BENCHMARKS))
    import scale  # noqa: PLC0415 - it makes a group

    said = {}
    for layout in layouts:
        sizes, names, declared = scale.LAYOUTS[layout]
        for p in (2.0, math.inf):
            calls = scale.count(sizes, names, declared, p)
            said[f"{layout} {p}"] = [(len(ranks), size) for ranks, size in calls]
    return said


def test_collectives_on_thousands_of_ranks():
    dimensions = {
        "FSDP2 over 1024": [1024],
        "8 x 8 x 16": [8, 16, 8],
        "FSDP2 over 4096": [4096],
        "4096 as 4 x 16 x 8 x 8": [8, 16, 8, 4],
    }
    if not ALL_COMBINATIONS:
        del dimensions["FSDP2 over 4096"]  # it takes a minute
    counted = alone(counted_on, list(dimensions))
    with (BENCHMARKS / "results" / "scale.csv").open() as file:
        committed = {f"{row['layout']} {row['norm_type']}": row for row in csv.DictReader(file)}
    for layout, sizes in dimensions.items():
        once, twice = counted[f"{layout} 2.0"], counted[f"{layout} inf"]
        assert [ranks for ranks, _ in once] == sizes
        assert [ranks for ranks, _ in twice] == [size for size in sizes for _ in range(2)]
        assert all(size <= 264 for _, size in once + twice)
        for p, calls in (("2", once), ("inf", twice)):
            row = committed[f"{layout} {p}"]
            assert row["of_ranks"].split() == [str(ranks) for ranks, _ in calls]
            assert row["bytes"].split() == [str(size) for _, size in calls]
