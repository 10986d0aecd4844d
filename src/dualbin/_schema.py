"""What the arrays of a table and of its optimizer state are called and made of: the one place where Python names them.

The native library has the same lists (`cuda/include/dualbin/types.h`); they are compared when it is loaded.
"""

from __future__ import annotations

from typing import NamedTuple

#: of the workspace of a native call, in bytes
ALIGNMENT = 256

#: modes of a bag lookup, kinds of rules, norms of Counter, operations that need a workspace: in the order of their native codes
BAG_MODES = ("sum", "mean", "majority")
RULE_KINDS = ("counter", "bop", "sign")
NORMS = ("rms", "adagrad")
WORKSPACE_OPS = ("reduce_rows", "segment_sum", "update")

#: what an update counts, in the order of its result
STATS = ("flips", "rows", "skipped", "clipped")


class StateArray(NamedTuple):
    """An array of the optimizer state of a table."""

    dtype: str
    #: what a row of it is: "one" number (the array is `[V]`), a number for each of the D "columns", the bit-"planes" of its counters, or a
    #: "record" of the numbers that are named in RECORD
    per_row: str


#: arrays that an update changes, in the order of the native struct
STATE_ARRAYS = {
    "counter": StateArray("uint8", "planes"),
    "ema": StateArray("float32", "columns"),
    "record": StateArray("int32", "record"),
    "count": StateArray("int32", "one"),
    "squares": StateArray("float32", "one"),
}

#: what the words of a record are, in order: a row's numbers in one cache line, where its scale is trained. In files, and wherever else a
#: state leaves the library, each is an array `[V]` by this name.
RECORD = {"count": "int32", "squares": "float32", "scale_m": "float32", "scale_v": "float32"}

MAX_PLANES = 8

#: columns that the native library takes
MAX_DIM = 2**28


def packed_width(dim: int) -> int:
    """Bytes of a packed row of D weights: ceil(D / 8)."""
    return (dim + 7) // 8


def state_shape(name: str, rows: int, dim: int, planes: int) -> tuple[int, ...]:
    """Shape of a state array, or of a number of a record, of a table of V rows and D columns whose counters have so many planes."""
    columns = {"one": (), "columns": (dim,), "planes": (planes * packed_width(dim),), "record": (len(RECORD),)}
    return rows, *columns[STATE_ARRAYS[name].per_row if name in STATE_ARRAYS else "one"]


def native_form() -> dict[str, object]:
    """What `dualbin._native.schema()` returns if it was built from the same lists, but for `rule_numbers`: those are in `dualbin.rules`."""
    return {
        "alignment": ALIGNMENT,
        "bag_modes": BAG_MODES,
        "rule_kinds": RULE_KINDS,
        "norms": NORMS,
        "max_planes": MAX_PLANES,
        "workspace_ops": WORKSPACE_OPS,
        "stats": STATS,
        "state_arrays": tuple((name, *array) for name, array in STATE_ARRAYS.items()),
        "record": tuple(RECORD.items()),
    }
