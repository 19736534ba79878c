"""What was done and moved: one row per launch or move, by layer, stage and kind.

The schema is public (`SCHEMA_VERSION`, `Event`). Emulated quantities only: no host second ever enters the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from wse_emu.foundation.errors import InputError

SCHEMA_VERSION: Final = 1
"""Version of the fields of `Event`; grows when a field is added or changes its meaning."""

KINDS: Final = (
    "launch", "inject", "drain", "stream", "broadcast", "chain", "deliver", "allgather", "shift", "send", "gather",
    "control", "probe",
)  # fmt: skip
"""Kinds of events.

``launch`` work on cores; ``inject``/``drain`` tokens in and logits out over the wafer's edge; ``stream`` weights from MemoryX over the
edge and down the columns; ``broadcast`` ``chain`` ``deliver`` ``allgather`` ``shift`` ``send`` ``gather`` moves inside the fabric;
``control`` the small channel that tells MemoryX which experts were chosen; ``probe`` what the host looks at (hidden states, taps).
"""


class Event(NamedTuple):
    """One launch or one move, summed over all cores that take part in it."""

    layer: int | None
    """Layer index; None outside the layers."""
    stage: str
    """Part of the model's program, for instance ``"attention"``."""
    kind: str
    """One of `KINDS`."""
    name: str
    """Kernel or tensor."""
    count: int = 1  # type: ignore[assignment]  # the tuple's own method is not for events
    """Cores that ran the kernel, or messages sent (a multicast is one message)."""
    macs: int = 0
    """Multiply-adds done by kernels (one fma each; additions, exponentials and comparisons are not counted)."""
    bytes: int = 0
    """Payload injected into the fabric, each message once."""
    wavelets: int = 0
    """32-bit words of that payload, rounded up message by message."""
    wavelet_hops: int = 0
    """Links crossed, summed over wavelets; a link of a multicast tree counts once."""
    max_link_wavelets: int = 0
    """Wavelets on the busiest link during this event."""
    max_hops: int = 0
    """Links on the longest path of one message."""
    colors: int = 0
    """Fabric colors whose routes the move needs."""


_SUMMED: Final = ("count", "macs", "bytes", "wavelets", "wavelet_hops")
_MAXED: Final = ("max_link_wavelets", "max_hops", "colors")


class Ledger:
    """Record of all events since the last `clear`, in the order in which they happened.

    Identical repetitions (decode steps) make the list long; `totals` sums it by any of layer, stage, kind and name.
    """

    def __init__(self) -> None:
        self._events: list[tuple[int | None, str, Event]] = []
        self._layer: int | None = None
        self._stage: str = "host"

    @contextmanager
    def scope(self, stage: str, layer: int | None = None) -> Iterator[None]:
        """Attribute the events recorded inside the block to `stage` of `layer`."""
        before = (self._layer, self._stage)
        self._layer, self._stage = layer, stage
        try:
            yield
        finally:
            self._layer, self._stage = before

    def record(self, event: Event) -> None:
        """Append `event`, attributed to the current scope."""
        self._events.append((self._layer, self._stage, event))

    def clear(self) -> None:
        """Forget everything recorded so far."""
        self._events.clear()

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        return f"Ledger({len(self):,} event{'' if len(self) == 1 else 's'})"

    def events(self, start: int = 0) -> list[Event]:
        """Events from index `start` on, oldest first."""
        return [event._replace(layer=layer, stage=stage) for layer, stage, event in self._events[start:]]

    def totals(self, by: Sequence[str] = ("layer", "stage", "kind"), start: int = 0) -> list[dict[str, Any]]:
        """Sums over events that agree in the fields `by`, in order of first appearance.

        Parameters
        ----------
        by : sequence of {"layer", "stage", "kind", "name"}
            Fields to group by; an empty sequence gives one row.
        start : int
            Index of the first event to count (``len(ledger)`` taken earlier).

        Returns
        -------
        list of dict
            All fields of `Event`; fields not in `by` are None. Maxima (`max_link_wavelets`, `max_hops`, `colors`) are maxima.

        Raises
        ------
        InputError
            If `by` names anything else.
        """
        unknown = set(by) - {"layer", "stage", "kind", "name"}
        if unknown or isinstance(by, str):
            raise InputError(f"`by` must be a sequence of layer, stage, kind and name, for instance ('kind',); got {by!r}")
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for event in self.events(start):
            key = tuple(getattr(event, name) for name in by)
            row = rows.get(key)
            if row is None:
                row = dict.fromkeys(("layer", "stage", "kind", "name"))
                row.update(zip(by, key, strict=True))
                row.update(dict.fromkeys((*_SUMMED, *_MAXED), 0))
                rows[key] = row
            for name in _SUMMED:
                row[name] += getattr(event, name)
            for name in _MAXED:
                row[name] = max(row[name], getattr(event, name))
        return list(rows.values())

    def to_json(self, path: str | Path | None = None) -> str:
        """The ledger as one JSON document; also written to `path` if given.

        Keys: ``schema`` (`SCHEMA_VERSION`), ``fields`` (names of `Event`), ``events`` (one list per event, in that order) and ``totals``
        (by layer, stage and kind).
        """
        document = {
            "schema": SCHEMA_VERSION,
            "fields": list(Event._fields),
            "events": [list(event) for event in self.events()],
            "totals": self.totals(),
        }
        text = json.dumps(document)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text
