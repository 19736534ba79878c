"""Feed-forward networks: one for all tokens, or experts that stream past and serve the tokens of each row that chose them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wse_emu.foundation.activations import Activation
from wse_emu.layers import clamped_experts
from wse_emu.layers.clamped_experts import ClampedWeights
from wse_emu.layers.linear import COMBINE, DEFAULT_CHUNK, GEGLU, SWIGLU, Selection, all_gather_bands, matmul
from wse_emu.layers.router import Routing
from wse_emu.layers.stream import StreamedMatrix
from wse_emu.wafer.kernel import Kernel
from wse_emu.wafer.ledger import Event
from wse_emu.wafer.placement import Ints, Split, TokenBands
from wse_emu.wafer.tensor import PlacedTensor
from wse_emu.wafer.wafer import Wafer
from wse_kernels.experts import AT_ONCE, FEW_TOKENS, mesh_experts
from wse_kernels.ffn import combine_rows, scale_rows
from wse_kernels.norm import fill_zero
from wse_kernels.routing import group_tokens, select_expert

MoeImplementation = Literal["functional", "experimental", "optimized"]

FILL_ZERO = Kernel(body=fill_zero, params=("x",), out=("x",), code_bytes=64)
GROUP_TOKENS = Kernel(
    body=group_tokens,
    params=("topk_ids", "topk_weights", "starts", "rows", "scale"),
    out=("starts", "rows", "scale"),
    code_bytes=256,
)
COMBINE_ROWS = Kernel(
    body=combine_rows,
    params=("y", "rows", "scale", "out"),
    inout=("out",),
    code_bytes=160,
    macs=lambda s: s["rows"][0] * s["y"][1],
)
SCALE_ROWS = Kernel(body=scale_rows, params=("x", "rows", "scale", "out"), out=("out",), code_bytes=128)
SELECT_EXPERT = Kernel(
    body=select_expert,
    params=("topk_ids", "topk_weights", "expert", "rows", "scale", "n_rows"),
    out=("rows", "scale", "n_rows"),
    code_bytes=192,
)


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """Weights of one feed-forward network, on their way to the wafer."""

    gate_up: StreamedMatrix
    """(hidden, 2 * ffn), gate and up columns alternating."""
    down: StreamedMatrix
    """(ffn, hidden)."""
    activation: Activation = "silu"
    clamped: ClampedWeights | None = None
    """Biases and limits that take the place of `activation`."""

    @property
    def mode(self) -> int:
        """How `matmul` gates."""
        return SWIGLU if self.activation == "silu" else GEGLU


Experts = Sequence[tuple[int, FfnWeights]]
"""Experts by number, ascending."""


def dense_ffn(
    wafer: Wafer, x: PlacedTensor, weights: FfnWeights, out: PlacedTensor, bands: TokenBands, *, chunk: int = DEFAULT_CHUNK,
    probe: Callable[[str, PlacedTensor], None] | None = None,
) -> None:  # fmt: skip
    """``out = (activation(x @ w_gate) * (x @ w_up)) @ w_down``.

    Parameters
    ----------
    wafer : Wafer
    x, out : PlacedTensor, (T, hidden), float32
        `out` is written.
    weights : FfnWeights
    bands : TokenBands
    chunk : int
        Most columns of one streamed piece.
    probe : callable, optional
        Shown ``("ffn_hidden", h)``.
    """
    width = weights.down.n_in
    place = wafer.placement((bands.n_tokens, width), x.placement.axis0, ("col", Split.balanced(width, wafer.cols)))
    with wafer.empty("ffn hidden", place, stored=x.stored) as h:
        _every_token(wafer, x, weights, h, out, bands, chunk)
        if probe is not None:
            probe("ffn_hidden", h)


def _every_token(
    wafer: Wafer, x: PlacedTensor, weights: FfnWeights, h: PlacedTensor, out: PlacedTensor, bands: TokenBands, chunk: int
) -> None:
    """One network for all tokens: hidden layer and output, complete on every row of a band."""
    if weights.clamped is not None:
        with clamped_experts.gate_and_up(wafer, h) as y:
            clamped_experts.hidden(wafer, x, weights.gate_up, weights.clamped, y, h, bands, chunk=chunk)
        clamped_experts.output(wafer, h, weights.down, weights.clamped, out, bands, None, chunk=chunk)
        return
    matmul(wafer, x, weights.gate_up, h, bands, mode=weights.mode, chunk=chunk)
    all_gather_bands(wafer, h, bands)
    matmul(wafer, h, weights.down, out, bands, chunk=chunk)
    all_gather_bands(wafer, out, bands)


@dataclass(slots=True)
class ExpertTaps:
    """Per-token, per-slot values of a layer's experts, for the probe."""

    hidden: NDArray[np.float32]
    """(T, top_k, ffn)."""
    out: NDArray[np.float32]
    """(T, top_k, hidden)."""


def experts_ffn(
    wafer: Wafer, x: PlacedTensor, routing: Routing, experts: Iterable[Experts], width: int, out: PlacedTensor,
    bands: TokenBands, *, n_experts: int, chunk: int = DEFAULT_CHUNK, taps: ExpertTaps | None = None,
    implementation: MoeImplementation = "experimental", before: bool = False, begun: bool = False,
) -> None:  # fmt: skip
    """Mixture of experts: ``out[t] = sum over chosen e, ascending, of weight[t, e] * ffn_e(x[t])``, each added with fma from +0.

    With `begun` they are added to what `out` holds, the shared experts' output.

    Expert by expert, the weights stream past all rows; every row applies them to its own tokens that chose the expert. However that is
    done, the bits are the same: a token's numbers never meet another token's.

    Parameters
    ----------
    wafer : Wafer
    x, out : PlacedTensor, (T, hidden), float32
        `out` is written; each expert adds to it, so it should not be of a format of 16 bits. What `x` is stored in, hidden layers are too.
    routing : Routing
    experts : iterable of sequences of (expert id, FfnWeights)
        In ascending order, those together whose weights are there at the same time; must hold every chosen expert.
    width : int
        Features of an expert's hidden layer.
    bands : TokenBands
    n_experts : int
    chunk : int
        Most columns of one streamed piece.
    taps : ExpertTaps, optional
        Filled through the probe channel.
    implementation : {"functional", "experimental", "optimized"}
        Compute every expert for every token and mask the result; or, expert by expert, search for the tokens that chose it; or sort the
        tokens by expert once.
    before : bool
        Multiply the expert's input by the token's weight instead of its output; not with "functional".
    begun : bool
        Whether `out` holds a first term, complete on every row of a token's band.
    """
    place = wafer.placement((bands.n_tokens, width), x.placement.axis0, ("col", Split.balanced(width, wafer.cols)))
    if not begun:
        wafer.launch(FILL_ZERO, x=out)
    complete = False  # on every row of a band
    with wafer.empty("expert hidden", place, stored=x.stored) as h:
        with ExitStack() as stack:
            lists = stack.enter_context(ExpertLists(wafer, routing, bands, n_experts, sorted_once=implementation == "optimized"))
            if implementation == "functional":
                _mask_every_token(wafer, x, routing, experts, lists, h, out, bands, taps, chunk)
                return
            scaled = stack.enter_context(wafer.empty("weighted tokens", x.placement, stored=x.stored)) if before else None
            fused = wafer.cores is None and taps is None and not before and experts_together(bands.n_tokens) > 1
            fused = fused and h.stored is None  # one driver stores nothing between its products
            for group in experts:
                if fused and all(weights.clamped is None and not weights.gate_up.leaves_zeros for _, weights in group):
                    _at_once(wafer, x, group, lists, h, out, bands, chunk)
                    continue
                for expert, weights in group:
                    selection = lists.selection(expert)
                    if weights.clamped is not None:
                        slots = routing.topk_ids == expert
                        _clamped(wafer, x, weights, h, out, bands, selection, scaled, lists.tokens(expert), slots, taps, chunk)
                        complete = True
                        continue
                    if scaled is None:
                        matmul(wafer, x, weights.gate_up, h, bands, mode=weights.mode, take=selection, chunk=chunk)
                    else:
                        on_selected(wafer, SCALE_ROWS, selection, {"x": x, "out": scaled}, bands, compact="out")
                        matmul(wafer, scaled, weights.gate_up, h, bands, mode=weights.mode, compact=selection, chunk=chunk)
                        selection = replace(selection, scale=np.ones_like(selection.scale), scale_blocks=None)
                    all_gather_bands(wafer, h, bands, selection)
                    if taps is not None:
                        _tap(wafer, h, weights, out, bands, selection, lists.tokens(expert), (routing.topk_ids == expert), taps, chunk)
                    matmul(wafer, h, weights.down, out, bands, mode=COMBINE, put=selection, chunk=chunk)
    if not complete:
        all_gather_bands(wafer, out, bands)


def experts_together(n_tokens: int) -> int:
    """How many experts are best streamed at a time for so many tokens: those of a few go through one driver together."""
    return AT_ONCE if n_tokens <= FEW_TOKENS else 1


def _at_once(
    wafer: Wafer, x: PlacedTensor, experts: Experts, lists: ExpertLists, h: PlacedTensor, out: PlacedTensor, bands: TokenBands, chunk: int
) -> None:
    """Several experts in one driver; on the wafer they come one by one, and are accounted for so."""
    for first in range(0, 0 if wafer.is_dry else len(experts), AT_ONCE):
        some = experts[first : first + AT_ONCE]
        starts, rows, scale = lists.entries([expert for expert, _ in some])
        mesh_experts(
            x.unsettled, bands.n_tokens, x.placement.axis1[1].offsets, starts, rows, scale,
            [w.gate_up.values for _, w in some], [w.down.values for _, w in some], x.placement.shape[1], h.placement.shape[1],
            some[0][1].mode, h.placement.axis1[1].offsets, out.unsettled, bands.n_tokens, out.placement.axis1[1].offsets,
            out.placement.shape[1], run=wafer.pending.run,
        )  # fmt: skip
    for expert, weights in experts:
        tokens = lists.tokens(expert).tobytes()
        at_rest = tuple((matrix.name, matrix.n_bytes) for matrix in (weights.gate_up, weights.down))
        program = _at_once, lists.kind, tokens, x.placement, out.placement, at_rest, h.placement.shape, weights.mode, chunk
        events = wafer.known_events(program)
        if events is not None:
            wafer.ledger.extend(events)
            continue
        with wafer.first_run(program):
            selection = lists.selection(expert)
            matmul(wafer, x, weights.gate_up, h, bands, mode=weights.mode, take=selection, chunk=chunk, elsewhere=True)
            all_gather_bands(wafer, h, bands, selection)
            matmul(wafer, h, weights.down, out, bands, mode=COMBINE, put=selection, chunk=chunk, elsewhere=True)


def _clamped(
    wafer: Wafer, x: PlacedTensor, weights: FfnWeights, h: PlacedTensor, out: PlacedTensor, bands: TokenBands, selection: Selection,
    scaled: PlacedTensor | None, tokens: NDArray[np.int64], slots: NDArray[np.bool_], taps: ExpertTaps | None, chunk: int,
) -> None:  # fmt: skip
    """One expert with biases and a clamped gate, for the tokens that chose it; `scaled` is room for them, times their weights."""
    assert weights.clamped is not None
    with clamped_experts.gate_and_up(wafer, h) as y:
        if scaled is None:
            clamped_experts.hidden(wafer, x, weights.gate_up, weights.clamped, y, h, bands, take=selection, chunk=chunk)
        else:
            on_selected(wafer, SCALE_ROWS, selection, {"x": x, "out": scaled}, bands, compact="out")
            clamped_experts.hidden(wafer, scaled, weights.gate_up, weights.clamped, y, h, bands, compact=selection, chunk=chunk)
            selection = replace(selection, scale=np.ones_like(selection.scale), scale_blocks=None)
    with wafer.empty("expert output", out.placement) as y:
        clamped_experts.output(wafer, h, weights.down, weights.clamped, y, bands, selection, chunk=chunk)
        if taps is not None:
            slot = slots[tokens].argmax(axis=1)
            taps.hidden[tokens, slot] = read_compact(h, bands, selection)
            taps.out[tokens, slot] = read_compact(y, bands, selection)
        clamped_experts.combine(wafer, y, selection, out, bands)


def _mask_every_token(
    wafer: Wafer, x: PlacedTensor, routing: Routing, experts: Iterable[Experts], lists: ExpertLists, h: PlacedTensor,
    out: PlacedTensor, bands: TokenBands, taps: ExpertTaps | None, chunk: int,
) -> None:  # fmt: skip
    """Every expert for every token; of the result, what was asked for is added. Rows of a band do so alike, and need not be gathered."""
    with wafer.empty("expert output", out.placement) as y:
        for expert, weights in chain.from_iterable(experts):
            _every_token(wafer, x, weights, h, y, bands, chunk)
            if taps is not None:
                tokens, slots = np.nonzero(routing.topk_ids == expert)
                taps.hidden[tokens, slots] = wafer.drain(h, kind="probe")[tokens]
                taps.out[tokens, slots] = wafer.drain(y, kind="probe")[tokens]
            on_selected(wafer, COMBINE_ROWS, lists.selection(expert), {"y": y, "out": out}, bands)


def on_selected(
    wafer: Wafer, kernel: Kernel, selection: Selection, tensors: dict[str, PlacedTensor], bands: TokenBands, compact: str = ""
) -> None:
    """Run a body on every core that holds selected tokens, with their lists; of the tensor `compact` it has the first places only."""
    split = tensors["out"].placement.axis1[1]
    rows = np.flatnonzero(selection.counts)
    with wafer.sram.code(kernel.name, kernel.code_bytes):
        if wafer.cores is not None:
            for row in rows.tolist():
                for col in split.used.tolist():
                    places, scale = selection.heads(row, col)
                    blocks = {name: tensor.held[row, col] for name, tensor in tensors.items()}
                    if compact:
                        blocks[compact] = blocks[compact].view(slice(0, int(selection.counts[row])))
                    wafer.cores.run(kernel, (row, col), {**blocks, "rows": places, "scale": scale})
        elif not wafer.is_dry:
            for col in split.used.tolist():
                panels = {}
                for name, tensor in tensors.items():
                    n = selection.n_tokens if name == compact else bands.n_tokens
                    j0, j1 = int(split.starts[col]), int(split.stops[col])
                    panels[name] = tensor.flat[n * j0 : n * j1].reshape(n, j1 - j0)
                kernel.body(*({**panels, "rows": selection.rows, "scale": selection.scale}[name] for name in kernel.params))
            for name in (*kernel.out, *kernel.inout):
                tensors[name].settle()
    macs = int(selection.counts.sum()) * split.total if kernel.macs else 0
    wafer.record(Event(None, "", "launch", kernel.name, count=int(rows.size * split.used.size), macs=macs))


class ExpertLists:
    """Tokens of every expert, on every core of their row: searched for expert by expert, or sorted once."""

    def __init__(self, wafer: Wafer, routing: Routing, bands: TokenBands, n_experts: int, *, sorted_once: bool) -> None:
        self._wafer, self._routing, self._bands, self._sorted = wafer, routing, bands, sorted_once
        self._known = _Grouped(routing, n_experts)
        top_k = routing.topk_ids.shape[1]
        entries = bands.split.scaled(top_k) if sorted_once else bands.split
        lists = wafer.placement((1, entries.total), (None, None), ("row", entries))
        counts = wafer.placement((1, bands.n_token_bands * (n_experts + 1)), (None, None), ("row", _counters(bands).scaled(n_experts + 1)))
        one = wafer.placement((1, bands.n_token_bands), (None, None), ("row", _counters(bands)))
        with ExitStack() as stack:
            self._rows = stack.enter_context(wafer.empty("expert tokens", lists, np.int64, ndim=1))
            self._scale = stack.enter_context(wafer.empty("expert token weights", lists, ndim=1))
            self._counts = stack.enter_context(wafer.empty("expert token count", counts if sorted_once else one, np.int64, ndim=1))
            if sorted_once:
                self._run(GROUP_TOKENS, starts=self._counts)
            self._held = stack.pop_all()

    def __enter__(self) -> ExpertLists:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def _run(self, kernel: Kernel, **more: Any) -> None:
        """Make lists on the cores; without cores of their own, only the launch is counted."""
        args = {"topk_ids": self._routing.ids, "topk_weights": self._routing.weights, "rows": self._rows, "scale": self._scale, **more}
        (self._wafer.launch if self._wafer.cores is not None else self._wafer.account)(kernel, **args)

    def tokens(self, expert: int) -> NDArray[np.int64]:
        """Tokens that chose `expert`, ascending."""
        return self._known.tokens(expert)

    @property
    def kind(self) -> Hashable:
        """What all entries in the ledger depend on, beside the expert and its tokens."""
        return self._bands, self._routing.ids.placement, self._sorted

    def entries(self, experts: list[int]) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """Where each of ascending experts' tokens begin (and the last one's end), the tokens, and their weights."""
        return self._known.entries(experts)

    def selection(self, expert: int) -> Selection:
        """The same as a selection."""
        bands = self._bands
        if not self._sorted:
            self._run(SELECT_EXPERT, expert=expert, n_rows=self._counts)
        if self._wafer.cores is None:
            return self._known.selection(expert, bands)
        counts, firsts, chosen = np.zeros(bands.n_rows, np.int64), np.zeros(bands.n_rows, np.int64), []
        for row in range(bands.used_rows):
            block = self._counts.block(row, 0)
            firsts[row], stop = (block[expert], block[expert + 1]) if self._sorted else (0, block[0])
            counts[row] = stop - firsts[row]
            if row % bands.n_feature_bands == 0:
                chosen.append(self._rows.block(row, 0)[firsts[row] : stop] + bands.split.starts[row])
        return Selection(counts, np.concatenate(chosen), np.zeros(1, np.float32), self._rows, self._scale, firsts)


class _Grouped:
    """Tokens of every expert, from the decision as a whole."""

    def __init__(self, routing: Routing, n_experts: int) -> None:
        n = routing.topk_ids.size
        self._starts = np.empty(n_experts + 1, np.int64)
        self._rows, self._scale = np.empty(n, np.int64), np.empty(n, np.float32)
        group_tokens(routing.topk_ids, routing.topk_weights, self._starts, self._rows, self._scale)

    def tokens(self, expert: int) -> NDArray[np.int64]:
        """Tokens that chose `expert`, ascending."""
        return self._rows[self._starts[expert] : self._starts[expert + 1]]

    def entries(self, experts: list[int]) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """Where each of ascending experts' tokens begin (and the last one's end), the tokens, and their weights."""
        starts = self._starts[[*experts, experts[-1] + 1]]
        where = slice(int(starts[0]), int(starts[-1]))
        return starts - starts[0], self._rows[where], self._scale[where]

    def selection(self, expert: int, bands: TokenBands) -> Selection:
        """The same as a selection."""
        where = slice(int(self._starts[expert]), int(self._starts[expert + 1]))
        return Selection.of_tokens(self._rows[where], bands.split, self._scale[where])


@lru_cache(maxsize=256)
def _counters(bands: TokenBands) -> Split:
    """One counter for each band of tokens; the rows of a band hold replicas."""
    split = bands.split
    index = np.where(split.sizes > 0, np.arange(len(split)) // bands.n_feature_bands, 0)
    return Split(bands.n_token_bands, index, np.where(split.sizes > 0, index + 1, index))


def _tap(
    wafer: Wafer, h: PlacedTensor, weights: FfnWeights, out: PlacedTensor, bands: TokenBands, selection: Selection,
    tokens: NDArray[np.int64], slots: NDArray[np.bool_], taps: ExpertTaps, chunk: int,
) -> None:  # fmt: skip
    """Read an expert's hidden layer, and its output before it is weighted (computed once more, for the probe)."""
    slot = slots[tokens].argmax(axis=1)
    taps.hidden[tokens, slot] = read_compact(h, bands, selection)
    with wafer.empty("probed expert output", out.placement) as y:
        matmul(wafer, h, weights.down, y, bands, compact=selection, chunk=chunk)
        all_gather_bands(wafer, y, bands, selection)
        taps.out[tokens, slot] = read_compact(y, bands, selection)


def read_compact(tensor: PlacedTensor, bands: TokenBands, selection: Selection) -> NDArray[np.float32]:
    """The first ``counts[row]`` rows of every band's block, as an (m, n) array, without an entry in the ledger; zeros from a dry wafer."""
    n = tensor.placement.shape[1]
    split = tensor.placement.axis1[1]
    whole = np.zeros((selection.n_tokens, n), np.float32)
    if tensor.wafer.is_dry:
        return whole
    if tensor.data is not None:
        m = selection.n_tokens
        if m == 1:
            return tensor.flat[:n].reshape(1, n).copy()
        for col in split.used.tolist():
            j0, j1 = int(split.starts[col]), int(split.stops[col])
            whole[:, j0:j1] = tensor.flat[m * j0 : m * j1].reshape(m, j1 - j0)
        return whole
    at = 0
    for row in bands.split.representatives.tolist():
        m = int(selection.counts[row])
        for col in split.used.tolist():
            whole[at : at + m, split.starts[col] : split.stops[col]] = tensor.block(row, col)[:m]
        at += m
    return whole
