"""Draw the pictures of docs/how-the-wafer-works.md from what the emulator really does: docs/pictures/*.svg.

    python tools/make_pictures.py              # writes docs/pictures
    python tools/make_pictures.py elsewhere    # another folder

Every position, number and order in a picture is read from a placed tensor, the ledger, the SRAM tracker or a run. The same code draws the
same bytes on any machine; a test holds the committed files against it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

import wse_emu as wse
from wse_emu.cli.options import shipped_model
from wse_emu.layers.linear import matmul
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.reports import Run
from wse_emu.reports.markup import Child, Markup, tag
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.moves import chain_row
from wse_emu.wafer.placement import Split, TokenBands

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"

STYLE = """
svg { --paper: #ffffff; --ink: #1c2430; --muted: #5d6875; --line: #b9c2cd; --accent: #2867ba; --warm: #b8560f;
  --k0: #2867ba; --k1: #1f8a5b; --k2: #b8560f; --k3: #8a3fb0; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #161a20; --ink: #e6e9ee; --muted: #99a2ae; --line: #47505c; --accent: #74b0f7; --warm: #f0a35e;
    --k0: #74b0f7; --k1: #6fd394; --k2: #f0a35e; --k3: #cf9bef; }
}
text { font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
.middle { text-anchor: middle; } .end { text-anchor: end; } .head { font-weight: 600; } .muted { fill: var(--muted); }
.small { font-size: 11px; } .accent { fill: var(--accent); } .warm { fill: var(--warm); }
.paper { fill: var(--paper); } .core { fill: none; stroke: var(--line); stroke-width: 1.5; } .cell { stroke: var(--line); }
.old { fill: var(--muted); } .moved { fill: var(--warm); } .new { fill: var(--accent); }
.k0 { fill: var(--k0); } .k1 { fill: var(--k1); } .k2 { fill: var(--k2); } .k3 { fill: var(--k3); }
.way { fill: none; stroke: var(--accent); stroke-width: 1.8; }
.home { fill: none; stroke: var(--warm); stroke-width: 1.8; stroke-dasharray: 5 3; }
.way-tip { fill: var(--accent); } .home-tip { fill: var(--warm); }
"""


def text(x: float, y: float, words: Child, style: str = "") -> Markup:
    """Words on a base line."""
    return tag("text", words, x=float(x), y=float(y), class_=style or None)


def box(x: float, y: float, width: float, height: float, style: str, *, strength: float | None = None, round_: int = 3) -> Markup:
    """A rectangle; `strength` from 0 to 1 is how much of its color is seen."""
    return tag(
        "rect", x=float(x), y=float(y), width=float(width), height=float(height), rx=round_, class_=style, fill_opacity=strength
    )  # fmt: skip


def arrow(*points: tuple[float, float], style: str = "way") -> Markup:
    """A line through points, with a tip at its end."""
    (x0, y0), (x1, y1) = points[-2:]
    along = np.array([x1 - x0, y1 - y0]) / np.hypot(x1 - x0, y1 - y0)
    across = np.array([-along[1], along[0]])
    end = np.array([x1, y1])
    corners = [end, end - 8 * along + 4 * across, end - 8 * along - 4 * across]
    line = [*points[:-1], tuple(end - 6 * along)]

    def path(places: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)

    tip = tag("path", d=path([tuple(c) for c in corners]) + "z", class_=f"{style}-tip")
    return tag("g", tag("path", d=path(line), class_=style), tip)


def picture(width: int, height: int, title: str, *parts: Markup) -> str:
    """A whole file; `title` is what it says to those who do not see it."""
    whole = tag(
        "svg", tag("title", title), tag("style", Markup(STYLE)), box(0, 0, width, height, "paper", round_=8), *parts,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
    )  # fmt: skip
    return whole.replace("</rect>", "</rect>\n").replace("/><", "/>\n<").replace("</text><", "</text>\n<") + "\n"


def span(start: int, stop: int) -> str:
    """A range of indices."""
    return f"{start}:{stop}"


def notes(x: float, y: float, *lines: str) -> list[Markup]:
    """Lines below each other."""
    return [text(x, y + 18 * i, line, "muted") for i, line in enumerate(lines)]


def account(event: Event) -> str:
    """One event of the ledger, in words."""

    def counted(n: int, name: str) -> str:
        return f"{n:,} {name}" if n == 1 else f"{n:,} {name}s"

    if event.kind == "launch":
        macs = f", {counted(event.macs, 'multiply-add')}" if event.macs else ""
        return f"launch {event.name}: {counted(event.count, 'run')}{macs}"
    return (
        f"{event.kind} {event.name}: {counted(event.count, 'message')}, {counted(event.bytes, 'byte')}, "
        f"{counted(event.wavelet_hops, 'link')} crossed, {counted(event.max_link_wavelets, 'wavelet')} on the busiest link"
    )


def placement() -> str:
    """Where the blocks of a tensor lie."""
    n_tokens, n_features, rows, cols = 7, 10, 3, 4
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols)
    tensor = wafer.place(np.zeros((n_tokens, n_features), np.float32), name="x")
    side, left, top, parts = 24, 34, 74, []
    cores_left, width, height = left + n_features * side + 60, 112, 60
    parts.append(text(left, 30, f"{n_tokens} tokens x {n_features} features, float32", "head"))
    parts.append(text(cores_left, 30, f"on {rows} x {cols} cores: a block on each", "head"))
    parts += [text(left + (j + 0.5) * side, top - 8, j, "small muted middle") for j in range(n_features)]
    parts += [text(left - 8, top + (i + 0.7) * side, i, "small muted end") for i in range(n_tokens)]
    for row in range(rows):
        for col in range(cols):
            i0, i1, j0, j1 = tensor.placement.ranges(row, col)
            style, strength = f"k{col} cell", 0.15 + 0.15 * row
            parts += [
                box(left + j * side, top + i * side, side, side, style, strength=strength, round_=0)
                for i in range(i0, i1)
                for j in range(j0, j1)
            ]
            x, y = cores_left + col * (width + 10), top + row * (height + 8) - 12
            parts += [
                box(x, y, width, height, style, strength=strength),
                text(x + 8, y + 18, f"core ({row}, {col})", "head"),
                text(x + 8, y + 35, f"x[{span(i0, i1)}, {span(j0, j1)}]"),
                text(x + 8, y + 51, f"{tensor.block(row, col).nbytes} bytes, from {tensor.placement.offset(row, col)}", "small muted"),
            ]
    bottom = top + n_tokens * side + 34
    parts += notes(
        left,
        bottom,
        "Rows of the tensor are balanced over rows of cores, its columns over columns: sizes differ by at most one.",
        "“from” is the block's first element in the emulator's one buffer: a column of cores is one piece of it.",
    )
    return picture(cores_left + cols * (width + 10) + 20, bottom + 36, "Blocks of a tensor on a grid of cores", *parts)


def chain() -> str:
    """Partial sums of each row of cores, added from west to east and delivered to their owner."""
    values = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.float32)
    rows, cols = values.shape
    owner, last = 1, cols - 1

    def sums(n: int) -> tuple[NDArray[np.float32], list[Event]]:
        """The chain over the first `n` columns, run one core at a time: what it delivers, and its events."""
        wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols, executor="isolated")
        of_rows = ("row", Split.balanced(rows, rows))
        parts = wafer.empty("partial sums", wafer.placement((rows, n), of_rows, ("col", Split.uniform(1, cols, range(n)))))
        wafer.inject(parts, np.ascontiguousarray(values[:, :n]))
        out = wafer.empty("sum", wafer.placement((rows, 1), of_rows, ("col", Split.single(1, owner, cols))))
        start = len(wafer.ledger)
        chain_row(wafer, parts, out)
        events = wafer.ledger.events(start)
        return out.gather()[:, 0], events

    so_far = np.stack([sums(n)[0] for n in range(1, cols + 1)], axis=1)
    events = sums(cols)[1]
    width, height, gap, left, top = 124, 78, 66, 30, 62
    parts = [text(left, 30, "each core holds a partial sum; the row adds them from west to east", "head")]
    for row in range(rows):
        y = top + row * (height + 62)
        for col in range(cols):
            x = left + col * (width + gap)
            added = f"{so_far[row, col - 1]:.0f} + {values[row, col]:.0f} = {so_far[row, col]:.0f}" if col else "begins"
            parts += [
                box(x, y, width, height, "core"),
                text(x + 10, y + 18, f"core ({row}, {col})", "small muted"),
                text(x + 10, y + 40, f"holds {values[row, col]:.0f}", "head"),
                text(x + 10, y + 62, added, "accent"),
            ]
            if col < last:
                middle = y + height / 2
                parts.append(arrow((x + width + 4, middle), (x + width + gap - 4, middle)))
                parts.append(text(x + width + gap / 2, middle - 8, f"{so_far[row, col]:.0f}", "middle accent"))
        start, end = left + last * (width + gap) + width / 2, left + owner * (width + gap) + width / 2
        parts.append(arrow((start, y + height), (start, y + height + 24), (end, y + height + 24), (end, y + height + 3), style="home"))
        parts.append(
            text((start + end) / 2, y + height + 41, f"the sum {so_far[row, last]:.0f} goes to its owner, column {owner}", "middle warm")
        )
    bottom = top + rows * (height + 62) + 16
    parts.append(text(left, bottom, "in the ledger", "head"))
    parts += [text(left, bottom + 20 * (i + 1), account(event)) for i, event in enumerate(events)]
    return picture(2 * left + cols * width + (cols - 1) * gap, bottom + 20 * len(events) + 20, "A chain of partial sums", *parts)


def streaming() -> str:
    """A piece of a weight matrix goes down the columns past the tokens, and is not kept."""
    n_tokens, n_in, n_out, rows, cols, owner = 6, 8, 12, 3, 4, 1
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=cols, executor="isolated")
    bands = TokenBands(n_tokens, rows)
    rng = np.random.default_rng(0)
    x = wafer.place(rng.normal(size=(n_tokens, n_in)).astype(np.float32), name="x")
    y = wafer.empty("y", wafer.placement((n_tokens, n_out), x.placement.axis0, ("col", Split.balanced(n_out, cols))))
    weight = rng.normal(size=(n_in, n_out)).astype(np.float32)
    before, start = wafer.sram.core_map(0, 0), len(wafer.ledger)
    matmul(wafer, x, StreamedMatrix("W", n_in, n_out, weight.reshape(-1)), y, bands)
    events, after, most = wafer.ledger.events(start), wafer.sram.core_map(0, 0), wafer.sram.high_water_map
    assert most is not None
    assert (most.row, most.col) == (0, 0)
    assert np.allclose(y.gather(), x.gather() @ weight, atol=1e-5)
    slab = dict(most.blocks)["weight slabs"]

    k, piece = x.placement.axis1[1], y.placement.axis1[1]
    side, left, top, width, height, gap = 17, 30, 62, 132, 62, 48
    wanted = span(int(piece.starts[owner]), int(piece.stops[owner]))
    head = f"MemoryX holds W ({n_in} x {n_out}); on its way is the piece for the features of y = x W that column {owner} will own"
    parts = [text(left, 30, head, "head")]
    for i in range(n_in):
        for j in range(n_out):
            col, going = int(k.owner[i]), int(piece.owner[j]) == owner
            parts.append(box(left + j * side, top + i * side, side, side, f"k{col} cell", strength=0.75 if going else 0.15, round_=0))
    parts += notes(
        left + n_out * side + 24,
        top + 16,
        f"Column c of cores holds the features K_c of x, and needs W[K_c, {wanted}].",
        "Each slab is broadcast down its column; every core multiplies with it and forgets it.",
    )
    taken = f"SRAM taken on core (0, 0): {before.used_bytes:,} bytes before, {most.used_bytes:,} at most,"
    parts.append(text(left + n_out * side + 24, top + 74, taken))
    parts.append(
        text(left + n_out * side + 24, top + 94, f"{slab} of them for slabs, and {after.used_bytes:,} after: the weights are gone.")
    )
    grid = top + n_in * side + 64
    for col in range(cols):
        at = left + col * (width + gap)
        name = f"W[{span(int(k.starts[col]), int(k.stops[col]))}, {wanted}]"
        parts.append(box(at, grid - 48, width, 24, f"k{col}", strength=0.6))
        parts.append(text(at + width / 2, grid - 31, name, "middle head"))
        for row in range(rows):
            y0 = grid + row * (height + 26)
            parts.append(arrow((at + 18, y0 - 24), (at + 18, y0 - 1)))
            i0, i1, j0, j1 = x.placement.ranges(row, col)
            parts += [
                box(at, y0, width, height, f"k{col} cell", strength=0.12),
                text(at + 10, y0 + 18, f"core ({row}, {col})", "small muted"),
                text(at + 10, y0 + 38, f"keeps x[{span(i0, i1)}, {span(j0, j1)}]"),
                text(at + 10, y0 + 54, "begins the sum" if col == 0 else "adds its product", "small accent"),
            ]
            if col < cols - 1:
                parts.append(arrow((at + width + 3, y0 + 30), (at + width + gap - 3, y0 + 30)))
    end = left + (cols - 1) * (width + gap) + width / 2
    for row in range(rows):
        y0, home = grid + row * (height + 26) + height, left + owner * (width + gap) + width - 20
        parts.append(arrow((end, y0), (end, y0 + 13), (home, y0 + 13), (home, y0 + 1), style="home"))
    bottom = grid + rows * (height + 26) + 22
    parts.append(text(left, bottom, "in the ledger, for the whole product", "head"))
    parts += [text(left, bottom + 20 * (i + 1), account(event)) for i, event in enumerate(events)]
    return picture(840, bottom + 20 * len(events) + 20, "A weight matrix streams past the tokens", *parts)


def experts() -> str:
    """Tokens of the shipped model's experts, by row of cores."""
    directory, rows = shipped_model(), 4
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = tokenizer.encode("If the argument is not a string, the result is None.").ids
    wafer = wse.Wafer(wse.WSE3, rows=rows, cols=4)
    model = wse.from_pretrained(directory, wafer=wafer)
    model(prompt)
    layer = 1
    load, bands = Run.of(model).experts[layer], TokenBands(len(prompt), rows)
    streamed = {e.name for e in wafer.ledger.events() if e.layer == layer and e.kind == "stream" and e.stage == "experts"}
    n_experts, side, left, top = load.by_expert.size, 58, 250, 84
    parts = [
        text(24, 30, f"layer {layer} of the shipped model: which rows' tokens each expert gets", "head"),
        text(24, top - 12, "row of cores, and its tokens", "muted"),
    ]
    parts += [text(left + (e + 0.5) * side, top - 12, f"expert {e}", "small middle") for e in range(n_experts)]
    for row in range(rows):
        words = tokenizer.decode(prompt[bands.split.starts[row] : bands.split.stops[row]])
        y = top + row * 44
        parts.append(text(24, y + 26, f"{row}:  “{words.strip()}”"))
        for e in range(n_experts):
            n = int(load.by_row[e, row])
            parts.append(box(left + e * side, y, side - 4, 40, "k0 cell" if n else "core", strength=0.18 * n if n else None))
            parts.append(text(left + e * side + side / 2 - 2, y + 25, n or "–", "middle head" if n else "middle muted"))
    bottom = top + rows * 44 + 22
    parts.append(text(24, bottom, "tokens in all"))
    for e, n in enumerate(load.by_expert.tolist()):
        came = any(f"experts.{e}." in name or name.endswith(f"experts.{e}") for name in streamed)
        assert came == (n > 0), (e, n, streamed)
        parts.append(text(left + e * side + side / 2 - 2, bottom, n, "middle"))
        word, style = ("streamed", "accent") if came else ("stays", "muted")
        parts.append(text(left + e * side + side / 2 - 2, bottom + 18, word, f"small middle {style}"))
    parts.append(text(24, bottom + 18, "its weights", "muted"))
    parts += notes(
        24,
        bottom + 48,
        f"{len(prompt)} tokens, {model.spec.top_k} experts each. Tokens never leave their row of cores:",
        "an expert's weights stream down past all rows, and each row applies them to its own tokens.",
    )
    return picture(left + n_experts * side + 20, bottom + 84, "Tokens of each expert by row of cores", *parts)


def cache() -> str:
    """The cache of one sequence as it grows: which tokens lie on which row, and which moved."""
    rows, lengths = 4, range(5, 11)
    config = {
        "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "max_position_embeddings": 32,
    }  # fmt: skip

    def held(length: int) -> tuple[list[int], int]:
        """Row of every token when the cache holds `length`, and messages of the shift that made room for the last one."""
        model = wse.from_config(config, wafer=wse.Wafer(wse.WSE3, rows=rows, cols=1))
        model.generate([np.arange(lengths[0] - 1)], max_new_tokens=length - lengths[0] + 2)
        assert model.recorded_kv is not None
        last = model.wafer.ledger.passes()[-1]
        events = model.wafer.ledger.events(last.start, last.stop)
        return np.repeat(np.arange(rows), model.recorded_kv[0, 0]).tolist(), sum(e.count for e in events if e.kind == "shift")

    side, left, top, panel = 26, 80, 92, 122
    parts = [text(24, 30, "keys and values of one sequence on four rows of cores, as it grows", "head")]
    parts += [text(left - 14, top + row * 34 + 18, f"row {row}", "small muted end") for row in range(rows)]
    before = held(lengths[0])[0]
    for i, length in enumerate(lengths):
        owner, n_messages = held(length)
        x = left + i * panel
        parts.append(text(x, top - 14, f"{length} tokens"))
        place = [0] * rows
        for token, row in enumerate(owner):
            at = (x + place[row] * (side + 2), top + row * 34)
            place[row] += 1
            is_new, has_moved = i > 0 and token == length - 1, token < len(before) and before[token] != row
            style, strength = ("new", 0.45) if is_new else ("moved", 0.45) if has_moved else ("old", 0.15)
            parts.append(box(*at, side, side, style, strength=strength))
            parts.append(text(at[0] + side / 2, at[1] + 18, token, "middle"))
        if i:
            parts.append(
                text(x, top + rows * 34 + 16, f"shift: {n_messages} {'message' if n_messages == 1 else 'messages'}", "small muted")
            )
        before = owner
    bottom = top + rows * 34 + 46
    parts += [
        box(left, bottom - 12, 14, 14, "new", strength=0.45), text(left + 20, bottom, "new token"),
        box(left + 110, bottom - 12, 14, 14, "moved", strength=0.45), text(left + 130, bottom, "moved up a row to make room"),
        text(left + 360, bottom, "Keys and values are a message each.", "muted"),
    ]  # fmt: skip
    parts += notes(left, bottom + 24, "At any length rows differ by at most one token.")
    return picture(left + len(lengths) * panel + 10, bottom + 42, "Growth of the key/value cache by shifts", *parts)


DRAWN: dict[str, Callable[[], str]] = {
    "placement": placement, "chain": chain, "streaming": streaming, "experts": experts, "cache": cache,
}  # fmt: skip


def pictures() -> Iterator[tuple[str, str]]:
    """Name and content of every file."""
    for name, draw in DRAWN.items():
        yield f"{name}.svg", draw()


def main(directory: Path = PICTURES) -> None:
    """Write all files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in pictures():
        (directory / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
