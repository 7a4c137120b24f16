"""On thousands of ranks: as many collectives as dimensions that shard, of about 200 bytes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from pairwise import ALL_COMBINATIONS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import scale
said = {}
for layout in sys.argv[2:]:
    sizes, names, declared = scale.LAYOUTS[layout]
    for p in (2.0, float("inf")):
        calls = scale.count(sizes, names, declared, p)
        said[f"{layout} {p}"] = [[len(ranks), size] for ranks, size in calls]
print(json.dumps(said))
"""


def test_collectives_on_thousands_of_ranks():
    dimensions = {
        "FSDP2 over 1024": [1024],
        "8 x 8 x 16": [16, 8, 8],
        "FSDP2 over 4096": [4096],
        "4096 as 4 x 16 x 8 x 8": [16, 8, 8, 4],
    }
    if not ALL_COMBINATIONS:
        del dimensions["FSDP2 over 4096"]  # it takes a minute
    run = subprocess.run(
        [sys.executable, "-c", COUNT, BENCHMARKS, *dimensions],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    counted = json.loads(run.stdout)
    with (BENCHMARKS / "results" / "scale.csv").open() as file:
        committed = {f"{row['layout']} {row['norm_type']}": row for row in csv.DictReader(file)}
    for layout, sizes in dimensions.items():
        once, twice = counted[f"{layout} 2.0"], counted[f"{layout} inf"]
        assert [ranks for ranks, _ in once] == sizes
        assert [ranks for ranks, _ in twice] == [size for size in sizes for _ in range(2)]
        assert all(size <= 216 for _, size in once + twice)
        for p, calls in (("2", once), ("inf", twice)):
            row = committed[f"{layout} {p}"]
            assert row["of_ranks"].split() == [str(ranks) for ranks, _ in calls]
            assert row["bytes"].split() == [str(size) for _, size in calls]
