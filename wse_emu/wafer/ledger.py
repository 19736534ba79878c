"""What was done and moved: one row per launch or move, by layer, stage and kind.

The schema is public (`SCHEMA_VERSION`, `Event`). Emulated quantities only: no host second ever enters the ledger.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from wse_emu.foundation.errors import InputError
from wse_emu.foundation.files import whole_file

SCHEMA_VERSION: Final = 3
"""Version of `Event`, `ForwardPass` and the JSON document; grows when a field is added or changes its meaning."""

KINDS: Final = (
    "launch", "inject", "drain", "stream", "broadcast", "chain", "deliver", "allgather", "shift", "send", "gather",
    "control", "probe",
)  # fmt: skip
"""Kinds of events.

``launch`` work on cores; ``inject``/``drain`` tokens in and logits out over the wafer's edge; ``stream`` weights from MemoryX over the
edge and down the columns; ``broadcast`` ``chain`` ``deliver`` ``allgather`` ``shift`` ``send`` ``gather`` moves inside the fabric;
``control`` the small channel that tells MemoryX which experts were chosen; ``probe`` what the host looks at (hidden states, taps).
"""

EDGE_KINDS: Final = ("inject", "drain")
"""Kinds that cross the wafer's edge with tokens and logits."""
FABRIC_KINDS: Final = tuple(kind for kind in KINDS if kind not in ("launch", *EDGE_KINDS, "stream", "control", "probe"))
"""Kinds that move data between cores."""


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
    """Payload injected into the fabric, each message once; of a matrix that streams, the bytes that the checkpoint stores it in."""
    wavelets: int = 0
    """32-bit words of that payload, rounded up message by message; a weight that streams, and a number of 16 bits, is one."""
    wavelet_hops: int = 0
    """Links crossed, summed over wavelets; a link of a multicast tree counts once."""
    max_link_wavelets: int = 0
    """Wavelets on the busiest link during this event."""
    max_hops: int = 0
    """Links on the longest path of one message."""
    colors: int = 0
    """Fabric colors whose routes the move needs."""


class NewTokens(NamedTuple):
    """Tokens of one sequence that a forward pass took in."""

    sequence: int
    """Sequence of the batch."""
    start: int
    """Position of the first of them."""
    n: int
    """How many."""


class ForwardPass(NamedTuple):
    """Events ``[start, stop)`` of the ledger: one run of new tokens through the model."""

    start: int
    stop: int
    phase: str
    """``"prompt"`` (a whole prompt or a chunk of it) or ``"decode"`` (one more token of every sequence that goes on, and
    memory tokens before it)."""
    tokens: tuple[NewTokens, ...]

    @property
    def n_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(t.n for t in self.tokens)


_KEYS: Final = ("layer", "stage", "kind", "name")
_SUMMED: Final = ("count", "macs", "bytes", "wavelets", "wavelet_hops")
_MAXED: Final = ("max_link_wavelets", "max_hops", "colors")
assert Event._fields == (*_KEYS, *_SUMMED, *_MAXED)


class _Scope:
    """What `Ledger.scope` gives."""

    __slots__ = ("_before", "_inside", "_ledger")

    def __init__(self, ledger: Ledger, layer: int | None, stage: str) -> None:
        self._ledger, self._inside, self._before = ledger, (layer, stage), ledger.current_scope

    def __enter__(self) -> None:
        self._before = self._ledger.current_scope
        self._ledger.current_scope = self._inside

    def __exit__(self, *error: object) -> None:
        self._ledger.current_scope = self._before


class Ledger:
    """Record of all events since the last `clear`, in the order in which they happened.

    Identical repetitions (decode steps) make the list long; `totals` sums it by any of layer, stage, kind and name. Layer and stage are
    kept once for all events of a stretch, so that an event which was recorded before costs one reference.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stretches: list[tuple[int, int | None, str]] = []
        """First event, layer and stage of every stretch of events with one scope."""
        self._layer: int | None = None
        self._stage: str = "host"
        self._passes: list[ForwardPass] = []

    def scope(self, stage: str, layer: int | None = None) -> AbstractContextManager[None]:
        """Attribute the events recorded inside the block to `stage` of `layer`."""
        return _Scope(self, layer, stage)

    @property
    def current_scope(self) -> tuple[int | None, str]:
        """Layer and stage of the events that are recorded now."""
        return self._layer, self._stage

    @current_scope.setter
    def current_scope(self, scope: tuple[int | None, str]) -> None:
        self._layer, self._stage = scope

    def where(self, tensor: str) -> str:
        """A tensor as errors name it, after the layer and the stage that run."""
        scope = ([] if self._layer is None else [f"layer {self._layer}"]) + ([self._stage] if self._stage else [])
        return f"{', '.join(scope)}: `{tensor}`" if scope else f"`{tensor}`"

    @contextmanager
    def forward_pass(self, phase: str, tokens: Sequence[NewTokens]) -> Iterator[None]:
        """Mark the events recorded inside the block as one forward pass; one that raises leaves no mark."""
        start = len(self)
        yield
        self._passes.append(ForwardPass(start, len(self), phase, tuple(tokens)))

    def record(self, event: Event) -> None:
        """Append `event`, attributed to the current scope."""
        last = self._stretches[-1] if self._stretches else None
        if last is None or last[1] != self._layer or last[2] != self._stage:
            self._stretches.append((len(self._events), self._layer, self._stage))
        self._events.append(event)

    def extend(self, events: Sequence[Event]) -> None:
        """Append events that happened one after the other, as `record` does."""
        if events:
            self.record(events[0])
            self._events.extend(events[1:])

    def recorded(self, start: int) -> tuple[Event, ...]:
        """Events from `start` on as they were given to `record`, without a scope."""
        return tuple(self._events[start:])

    def clear(self) -> None:
        """Forget everything recorded so far; not inside a forward pass."""
        self._events.clear()
        self._stretches.clear()
        self._passes.clear()

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        return f"Ledger({len(self):,} event{'' if len(self) == 1 else 's'})"

    def events(self, start: int = 0, stop: int | None = None) -> list[Event]:
        """Events ``[start, stop)``, oldest first; by default all."""
        return [event._replace(layer=layer, stage=stage) for layer, stage, event in self._located(start, stop)]

    def _located(self, start: int, stop: int | None) -> Iterator[tuple[int | None, str, Event]]:
        """Events ``[start, stop)`` with their layer and stage."""
        first, last, _ = slice(start, stop).indices(len(self._events))
        at = max(0, bisect_right(self._stretches, first, key=lambda stretch: stretch[0]) - 1)
        stretches = self._stretches[at:]
        ends = [*(begin for begin, _, _ in stretches[1:]), len(self._events)]
        for (begin, layer, stage), end in zip(stretches, ends, strict=False):  # an empty ledger has none
            if begin >= last:
                return
            for event in self._events[max(begin, first) : min(end, last)]:
                yield layer, stage, event

    def passes(self, start: int = 0) -> list[ForwardPass]:
        """Forward passes that began at event `start` or later, oldest first."""
        return [p for p in self._passes if p.start >= start]

    def totals(
        self, by: Sequence[str] = ("layer", "stage", "kind"), start: int = 0, stop: int | None = None
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Sums over events that agree in the fields `by`, in order of first appearance.

        Parameters
        ----------
        by : sequence of {"layer", "stage", "kind", "name"}
            Fields to group by; an empty sequence gives one row.
        start, stop : int, optional
            Events ``[start, stop)`` are counted (``len(ledger)`` taken earlier); by default all.

        Returns
        -------
        list of dict
            All fields of `Event`; fields not in `by` are None. Maxima (`max_link_wavelets`, `max_hops`, `colors`) are maxima.

        Raises
        ------
        InputError
            If `by` names anything else.
        """
        if isinstance(by, str) or not isinstance(by, Sequence) or not all(isinstance(name, str) and name in _KEYS for name in by):
            raise InputError(f"`by` must be a sequence of layer, stage, kind and name, for instance ('kind',); got {by!r}")
        at = [_KEYS.index(name) for name in by]
        first_max = len(_SUMMED)
        rows: dict[tuple[Any, ...], list[int]] = {}
        for layer, stage, event in self._located(start, stop):
            keys = (layer, stage, event.kind, event.name)
            key = tuple([keys[i] for i in at])
            numbers: tuple[int, ...] = event[len(_KEYS) :]  # type: ignore[assignment]  # keys come first
            row = rows.get(key)
            if row is None:
                rows[key] = list(numbers)
                continue
            for i, value in enumerate(numbers):
                row[i] = row[i] + value if i < first_max else max(row[i], value)
        blank = dict.fromkeys(_KEYS)
        return [
            {**blank, **dict(zip(by, key, strict=True)), **dict(zip((*_SUMMED, *_MAXED), row, strict=True))} for key, row in rows.items()
        ]

    def to_json(self, path: str | Path | None = None) -> str:
        """The ledger as one JSON document; also written to `path`, whole or not at all, if given.

        Keys: ``schema`` (`SCHEMA_VERSION`), ``fields`` (names of `Event`), ``events`` (one list per event, in that order), ``passes`` (one
        object per `ForwardPass`) and ``totals`` (by layer, stage and kind).
        """
        document = {
            "schema": SCHEMA_VERSION,
            "fields": list(Event._fields),
            "events": [list(event) for event in self.events()],
            "passes": [{**p._asdict(), "tokens": [t._asdict() for t in p.tokens]} for p in self._passes],
            "totals": self.totals(),
        }
        text = json.dumps(document)
        if path is not None:
            with whole_file(path) as file:
                file.write(text)
        return text
