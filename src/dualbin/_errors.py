"""Bad ids that lookups met on a GPU, where a kernel cannot raise: it counts them in a block of device memory, read on request."""

from __future__ import annotations

from dualbin._backends import load_native


def check_errors() -> None:
    """Raise if a lookup on a GPU met an id outside `[0, V)` since the last check; the check resets the record.

    Such a lookup returns rows of NaN and changes nothing else. This call waits for the devices on which lookups ran, whichever frontend
    made them. On the CPU there is nothing to report: lookups raise at once.

    Raises:
        IndexError: with the device, the number of bad ids and the first of them.
    """
    native, _ = load_native()
    found = native.take_errors() if native is not None else {}
    if found:
        places = "; ".join(f"{count} on cuda:{device}, the first is {first}" for device, (count, first) in sorted(found.items()))
        msg = f"ids outside [0, V) in lookups since the last check: {places}"
        raise IndexError(msg)
