"""What a long generation costs in memory: an event that came before is a reference, whatever scopes it lies in."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from wse_emu.wafer.ledger import Event, Ledger

STEP = [Event(None, "", "launch", f"kernel {i}", macs=i) for i in range(20)]


def record_steps(ledger: Ledger, n: int, n_layers: int = 4) -> None:
    for _ in range(n):
        for layer in range(n_layers):
            with ledger.scope("attention", layer):
                for event in STEP:
                    ledger.record(event)


def test_a_repeated_event_takes_about_a_reference() -> None:
    ledger = Ledger()
    record_steps(ledger, 10)
    tracemalloc.start()
    try:
        record_steps(ledger, 1000)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # 8 bytes an event; a stretch of twenty is a tuple of three, with its index and its place in a list: about 110 bytes.
    assert grown / (1000 * 4 * len(STEP)) < 8 * 1.25 + 120 / len(STEP)


@given(
    st.lists(st.tuples(st.none() | st.integers(0, 2), st.sampled_from(["a", "b"]), st.integers(0, 4)), max_size=8),
    st.integers(-3, 30),
    st.none() | st.integers(-3, 30),
)
def test_events_keep_their_scopes_in_any_range(scopes: list[tuple[int | None, str, int]], start: int, stop: int | None) -> None:
    ledger, expected = Ledger(), []
    for layer, stage, n in scopes:
        with ledger.scope(stage, layer):
            for i in range(n):
                event = Event(None, "", "chain", f"{i}", bytes=i)
                ledger.record(event)
                expected.append(event._replace(layer=layer, stage=stage))
    assert ledger.events() == expected
    assert ledger.events(start, stop) == expected[start:stop]
    rows = ledger.totals(by=("layer", "stage"), start=start, stop=stop)
    assert sum(row["bytes"] for row in rows) == sum(event.bytes for event in expected[start:stop])
