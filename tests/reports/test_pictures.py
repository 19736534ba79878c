"""Parts of the page: load of experts against a naive count, bins, color levels, escaping."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.reports.charts import LEVELS, Axes, Segment, bar, bin_name, binned, heat_map, level, number
from wse_emu.reports.expert_load import expert_load
from wse_emu.reports.markup import Markup, join, table, tag

from .pages import Page


@given(
    tokens=st.lists(st.integers(1, 9), min_size=1, max_size=4), rows=st.integers(1, 7), n_experts=st.integers(2, 5), seed=st.integers(0, 99)
)
def test_load_of_experts_is_what_a_naive_count_gives(tokens: list[int], rows: int, n_experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    passes = [np.argsort(rng.random((t, n_experts)), axis=1)[:, :2] for t in tokens]
    (load,) = expert_load([RoutingTrace((ids,)) for ids in passes], n_experts, rows)
    count = [[Fraction(0)] * rows for _ in range(n_experts)]
    busiest = Fraction(0)
    for ids in passes:
        n = len(ids)
        mine = [[Fraction(0)] * rows for _ in range(n_experts)]
        for t in range(n):
            if n >= rows:
                on = [next(r for r in range(rows) if r * n // rows <= t < (r + 1) * n // rows)]
            else:
                on = list(range(t * (rows // n), (t + 1) * (rows // n)))
            for e in ids[t].tolist():
                for r in on:
                    mine[e][r] += Fraction(1, len(on))
        busiest += sum(max(of_expert) for of_expert in mine)
        count = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(count, mine, strict=True)]
    np.testing.assert_allclose(load.by_row, np.array(count, np.float64), rtol=1e-14, atol=0)
    totals = [sum(of_expert) for of_expert in count]
    assert load.by_expert.tolist() == totals
    assert load.expert_ratio == pytest.approx(float(max(totals) / (sum(totals) / n_experts)), rel=1e-14)
    assert load.row_ratio == pytest.approx(float(busiest / (sum(totals) / rows)), rel=1e-14)
    assert load.row_ratio >= 1 - 1e-14


def test_a_model_without_moe_layers_has_no_load() -> None:
    assert expert_load([RoutingTrace(()), RoutingTrace(())], 0, 4) == ()


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), most=st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_bins_keep_the_largest_and_lose_nothing(shape: tuple[int, int], most: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random(shape)
    shown = binned(values, *most)
    assert shown.values.shape == (min(shape[0], most[0]), min(shape[1], most[1]))
    assert shown.is_binned == (shape[0] > most[0] or shape[1] > most[1])
    for i in range(len(shown.rows)):
        for j in range(len(shown.cols)):
            part = values[shown.rows.starts[i] : shown.rows.stops[i], shown.cols.starts[j] : shown.cols.stops[j]]
            assert shown.values[i, j] == part.max()
    assert (shown.rows.sizes.sum(), shown.cols.sizes.sum()) == shape


def test_color_levels_begin_above_nothing_and_end_at_the_full_scale() -> None:
    capacity = 49_152
    assert [level(v, capacity) for v in (0, 1, 4096, 4097, capacity - 1, capacity)] == [0, 1, 1, 2, LEVELS, LEVELS]
    assert level(0.0, 0.0) == 0


def test_bins_are_named_by_what_they_hold() -> None:
    shown = binned(np.zeros((5, 4)), 2, 4)
    assert [bin_name(shown.rows, i) for i in range(2)] == ["0\N{EN DASH}1", "2\N{EN DASH}4"]
    assert [bin_name(shown.cols, j) for j in range(4)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (100, "100"), (1234567, "1,234,567"), (0.5, "0.5"), (1 / 3, "0.33"), (1e-9, "0")])
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_large_maps_cover_every_cell_once_at_its_level() -> None:
    values = np.random.default_rng(1).integers(0, 13, (60, 70))
    picture = heat_map(binned(values, 96, 96), 12, Axes("row", "column", "x"))
    Page(picture)
    seen = np.full(values.shape, -1)
    for path in picture.split("<path ")[1:]:
        color = int(path.split('class="c')[1].split('"')[0])
        for run in path.split('d="')[1].split('"')[0].rstrip("z").split("zM"):
            at, _, rest = run.lstrip("M").partition("h")
            x, y = map(int, at.split())
            width = int(rest.split("v")[0])
            assert (seen[y, x : x + width] == -1).all()
            seen[y, x : x + width] = color
    np.testing.assert_array_equal(seen, values)


def test_bars_are_as_long_as_their_parts() -> None:
    picture = bar([Segment("a", 1, "one"), Segment("b", 0, "nothing"), Segment("c", 3, "three")], 8)
    widths = [float(part.split('width="')[1].split('"')[0]) for part in picture.split("<rect ")[1:]]
    assert widths == [12.5, 37.5]
    assert "nothing" not in picture
    assert bar([Segment("a", 0, "x")], 0).count("<rect") == 0


def test_elements_escape_what_is_not_markup() -> None:
    assert tag("p", "<b>", Markup("<i></i>"), None, 3, title='"&') == '<p title="&quot;&amp;">&lt;b&gt;<i></i>3</p>'
    assert tag("rect", x=1.0, y=1 / 3, class_="c") == '<rect x="1" y="0.33" class="c"/>'
    assert join(["<", Markup("<br>")], " ") == "&lt; <br>"
    assert "&lt;x&gt;" in table(["<x>"], [["<y>"]])
