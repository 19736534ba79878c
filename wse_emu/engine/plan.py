"""Does a model fit, where, and what would be streamed: answered by the program itself, run without values.

The ``dry`` executor runs one layer of each kind (mixture or dense, with or without a window) with the keys and values of all layers
reserved, and that is the peak of the whole run. No weights are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from wse_emu.checkpoint.stored import bytes_by_config
from wse_emu.engine.inference import shape_engine
from wse_emu.engine.options import CHUNKS, EngineOptions
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.foundation.arguments import show
from wse_emu.foundation.attention_pattern import AttentionPattern
from wse_emu.foundation.errors import InputError, SpecError, SramOverflowError
from wse_emu.foundation.memory_tokens import MemoryTokens
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.wafer_spec import WSE3, WaferSpec
from wse_emu.layers.kv_cache import Sequences
from wse_emu.memoryx.disk import DiskBytes
from wse_emu.wafer.sram import SramMap
from wse_emu.wafer.wafer import Wafer

MAX_PROMPT_TOKENS = 1 << 20
"""Tokens of all prompts together that are planned for."""


def check_prompt_tokens(n_tokens: int) -> None:
    """Raise `InputError` for more prompt tokens than anything here plans for, before arrays of that size are made."""
    if n_tokens > MAX_PROMPT_TOKENS:
        rule = f"at most {MAX_PROMPT_TOKENS} are planned for; give fewer or shorter ones"
        raise InputError(f"{show(n_tokens)} tokens of prompts (`prompt_tokens` times `batch`): {rule}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The forward passes that a grid must hold."""

    capacity: tuple[int, ...]
    """Most tokens of each sequence, prompt and new ones."""
    passes: tuple[tuple[tuple[int, int], ...], ...]
    """(sequence, new tokens), for every kind of forward pass (prompt chunks, decode)."""
    prompts: tuple[int, ...] | None = None
    """How many of them are prompt; None is all. It matters where keys and values do not shift."""
    step: int = 1
    """Most tokens of a sequence in one pass of decoding: the new one, and memory tokens before it."""
    probe: bool = False
    """Whether every stage is read, as `WaferModel.verify` does; an expert's output then lies on the wafer once more."""

    @staticmethod
    def of(
        prompts: tuple[int, ...], new_tokens: int, prefill_chunk: int | None, *, probe: bool = False, memory: MemoryTokens | None = None
    ) -> Workload:
        """Prompts of these lengths in chunks, then `new_tokens` one by one, memory tokens between them; raises as `check_prompt_tokens`."""
        capacity, steps = tuple(n + new_tokens for n in prompts), (1,) * len(prompts)
        if memory is not None:  # none before the last new token, which is not taken in any more
            given, prompts = prompts, tuple(map(memory.length, prompts))
            capacity = tuple(memory.length(n + max(new_tokens - 1, 0)) + min(new_tokens, 1) for n in given)
            between = [end - n - new_tokens for end, n in zip(capacity, prompts, strict=True)]
            steps = tuple(1 + min(n, memory.num_memory_tokens_per_chunk) for n in between)
        check_prompt_tokens(sum(prompts))
        passes = list(dict.fromkeys(tuple(chunk) for chunk in prompt_chunks(prompts, prefill_chunk)))
        for sizes in dict.fromkeys(((1,) * len(prompts), steps)) if new_tokens > 1 else ():
            passes.append(tuple(enumerate(sizes)))
        return Workload(capacity=capacity, passes=tuple(passes), prompts=prompts, step=max(steps), probe=probe)


def prompt_chunks(lengths: tuple[int, ...], chunk: int | None) -> Iterator[list[tuple[int, int]]]:
    """Forward passes for prompts of these lengths: for each pass (sequence, tokens) of the sequences that still have tokens."""
    step = max(lengths) if chunk is None else chunk
    for first in range(0, max(lengths), step):
        yield [(i, min(step, n - first)) for i, n in enumerate(lengths) if n > first]


def sequences_of(slots: list[int], n_new: list[int], start: list[int], length: list[int] | None = None) -> Sequences:
    """`Sequences` of new tokens, flattened in the given order; as long as they are with these tokens unless `length` says more."""
    n, at = np.array(n_new, np.int64), np.array(start, np.int64)
    first = np.concatenate([[0], np.cumsum(n)[:-1]]).astype(np.int64)
    return Sequences(first, n, at, np.array(slots, np.int64), at + n if length is None else np.array(length, np.int64))


def _kind(spec: ModelSpec, layer: int) -> tuple[bool, AttentionPattern, int | None, int | None, bool, bool]:
    """What tells layers apart: network, attention, rotation, whether they choose their keys."""
    attention = spec.pattern(layer), spec.window(layer), spec.chunk(layer)
    return spec.is_moe_layer(layer), *attention, spec.rotates(layer), spec.runs_indexer(layer)


def kinds_of_layers(spec: ModelSpec) -> tuple[ModelSpec, list[int]]:
    """The model with one layer of each kind, and how many of each it has; kinds differ in network, attention or rotation."""
    kinds = Counter(_kind(spec, i) for i in range(spec.num_layers))
    moe, patterns, windows, chunks, rotates, chooses = zip(*kinds, strict=True)
    few: dict[str, Any] = {"num_layers": len(kinds), "patterns": patterns if spec.patterns else ()}
    few["sliding_layers"] = tuple(i for i, window in enumerate(windows) if window is not None)
    few["chunked_layers"] = tuple(i for i, chunk in enumerate(chunks) if chunk is not None)
    if spec.indexer is not None:
        few["indexer"] = replace(spec.indexer, shared_layers=tuple(i for i, own in enumerate(chooses) if not own))
    few["dense_layers"] = tuple(i for i, is_moe in enumerate(moe) if spec.is_moe and not is_moe)
    few["rotary"] = replace(spec.rotary, skipped_layers=tuple(i for i, turns in enumerate(rotates) if not turns))
    return replace(spec, **few), list(kinds.values())


@lru_cache(maxsize=512)
def peak_sram(spec: ModelSpec, wafer_spec: WaferSpec, rows: int, cols: int, work: Workload, options: EngineOptions) -> SramMap:
    """The fullest core at the fullest moment of a workload.

    Raises
    ------
    SramOverflowError
        If it does not fit, with a map of the worst core at that moment.
    """
    wafer = Wafer(wafer_spec, rows=rows, cols=cols, executor="dry")
    wafer.counts_visits = False
    engine = shape_engine(wafer, kinds_of_layers(spec)[0], options)
    n_moe = len(engine.spec.moe_layers)
    kinds = [_kind(spec, i) for i in range(spec.num_layers)]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    for new in work.passes:
        cache = engine.new_cache(work.capacity, prompts=work.prompts, of=spec, aliases=firsts)
        sequences = sequences_of([s for s, _ in new], [n for _, n in new], [_last_end(work, options, s, n) - n for s, n in new])
        trace = None
        if spec.is_moe:
            few = np.tile(np.arange(spec.n_slots, dtype=np.int64), (sequences.n_tokens, 1))
            trace = RoutingTrace((few,) * n_moe)
        wanted = np.arange(sequences.n_tokens, dtype=np.int64)
        engine.forward(np.zeros(sequences.n_tokens, np.int64), sequences, cache, wanted, taps=work.probe, trace=trace)
        cache.free()
    lies = wafer.sram.high_water_map
    assert lies is not None
    return lies


def _last_end(work: Workload, options: EngineOptions, sequence: int, n: int) -> int:
    """Tokens of a sequence after the last pass that brings `n` of them; the capacity where only room counts, and passes find all alike."""
    if work.prompts is None or n in (1, work.step) or (options.kv_growth == "shift" and options.kv == "store"):
        return work.capacity[sequence]
    prompt, step = work.prompts[sequence], max(m for new in work.passes for s, m in new if s == sequence)
    return prompt - prompt % step if n == step and options.kv_growth == "shift" else prompt


def settle(
    spec: ModelSpec, wafer_spec: WaferSpec, rows: int, cols: int, work: Workload, options: EngineOptions
) -> tuple[EngineOptions, SramMap]:  # fmt: skip
    """Options with the largest size of streamed pieces that fits, unless a size is given, and the fullest core with them.

    Raises
    ------
    SramOverflowError
        If a workload does not fit with any, or with the given one.
    """
    if options.chunk is not None:
        return options, peak_sram(spec, wafer_spec, rows, cols, work, options)
    for chunk in CHUNKS[:-1]:
        settled = replace(options, chunk=chunk)
        try:
            return settled, peak_sram(spec, wafer_spec, rows, cols, work, settled)
        except SramOverflowError:
            continue
    settled = replace(options, chunk=CHUNKS[-1])
    return settled, peak_sram(spec, wafer_spec, rows, cols, work, settled)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Where a model lies and what it takes."""

    rows: int
    cols: int
    fits: bool
    peak_bytes: int
    """Bytes on the worst core at its fullest; of what was asked for, if it does not fit."""
    worst_core: tuple[int, int]
    blocks: tuple[tuple[str, int], ...]
    """(name, bytes) of what lies there then."""
    stream_bytes_prefill: int
    """Weight bytes streamed for the prompt, if its tokens choose as many experts as they can."""
    stream_bytes_token: int
    """Weight bytes streamed for one decode step, likewise; where there are memory tokens, for one that takes them in."""
    chunk: int
    """Most columns of one streamed piece of a matrix."""
    kv_bytes: int
    """Bytes of keys and values, in all layers and over all cores, when every sequence is as long as planned. With ``kv="recompute"``: of
    the inputs of all layers, and of the keys and values of one layer of each pattern."""
    max_context: int
    """Longest sequence that this grid holds, with prompt chunks as planned (a prompt shorter than they are at once); 0 if it holds none.
    With ``kv_growth="concat"``: one whose prompt is as planned, and that grows from there."""
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return asdict(self)


def plan_model(
    spec: ModelSpec, *, wafer_spec: WaferSpec = WSE3, rows: int | None = None, cols: int | None = None, prompt_tokens: int = 512,
    new_tokens: int = 32, batch: int = 1, prefill_chunk: int | None = None, verify: bool = False, options: EngineOptions | None = None,
    config: Mapping[str, Any] | None = None,
) -> Plan:  # fmt: skip
    """Place a model on a grid, or on the smallest square grid that holds it, without weights.

    Parameters
    ----------
    spec : ModelSpec
    wafer_spec : WaferSpec
    rows, cols : int, optional
        The grid; one alone asks for a square.
    prompt_tokens, new_tokens, batch : int
        Tokens of each of `batch` prompts, and tokens to generate.
    prefill_chunk : int, optional
        Prompt tokens of each sequence per forward pass; all at once by default.
    verify : bool
        Also leave room for what `WaferModel.verify` of the prompt takes.
    options : EngineOptions, optional
    config : mapping, optional
        The model's config.json, which says how its weights are stored: what is streamed is counted so. Without it they are float32.

    Returns
    -------
    Plan
        With `fits` False and the reason in `message` if it does not fit.

    Raises
    ------
    SpecError
        If a number breaks its range.
    InputError
        If the sequence is longer than the model's positions, or there are more than `MAX_PROMPT_TOKENS` tokens of prompts.
    """
    for name, value, least in (("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 0), ("batch", batch, 1)):
        if type(value) is not int or value < least:
            raise SpecError(f"`{name}` must be an integer >= {least}, got {show(value)}")
    if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
        raise SpecError(f"`prefill_chunk` must be an integer >= 1 or None, got {show(prefill_chunk)}")
    for name, n, most in (("rows", rows, wafer_spec.n_rows), ("cols", cols, wafer_spec.n_cols)):
        if n is not None and (type(n) is not int or not 1 <= n <= most):
            raise SpecError(f"`{name}` must be an integer in 1..{most} or None, got {show(n)}")
    spec.check_length(prompt_tokens, new_tokens)
    check_prompt_tokens(prompt_tokens * batch)
    options = options or EngineOptions()
    options.check_batch(batch)
    work = Workload.of((prompt_tokens,) * batch, new_tokens, prefill_chunk, probe=verify, memory=spec.memory_tokens)
    chosen = rows is None and cols is None
    if chosen:
        side = smallest_square(spec, wafer_spec, work, options)
        rows = cols = side or min(wafer_spec.usable_rows, wafer_spec.usable_cols)
    rows, cols = cols if rows is None else rows, rows if cols is None else cols
    assert rows is not None
    assert cols is not None
    bytes_prefill, bytes_token = _pass_bytes(spec, prompt_tokens, batch, prefill_chunk, options, config)
    held = kv_bytes(spec, wafer_spec, rows, cols, work.capacity, options)
    longest = _max_context(spec, wafer_spec, rows, cols, prompt_tokens, batch, prefill_chunk, options)
    try:
        settled, lies = settle(spec, wafer_spec, rows, cols, work, options)
    except SramOverflowError as error:
        lies = error.core_map
        side = None if chosen else smallest_square(spec, wafer_spec, work, options)
        way_out = f"the smallest square that holds it is {side} x {side}" if side else f"no square grid of {wafer_spec.name} holds it"
        return Plan(
            rows=rows, cols=cols, fits=False, peak_bytes=lies.used_bytes, worst_core=(lies.row, lies.col), blocks=lies.blocks,
            stream_bytes_prefill=bytes_prefill, stream_bytes_token=bytes_token, chunk=options.chunk or CHUNKS[-1], kv_bytes=held,
            max_context=longest,
            message=f"does not fit {rows} x {cols} cores: {str(error).splitlines()[0]}; {way_out}",
        )  # fmt: skip
    return Plan(
        rows=rows, cols=cols, fits=True, peak_bytes=lies.used_bytes, worst_core=(lies.row, lies.col), blocks=lies.blocks,
        stream_bytes_prefill=bytes_prefill, stream_bytes_token=bytes_token, chunk=settled.piece, kv_bytes=held, max_context=longest,
        message=f"fits {rows} x {cols} cores: {lies.used_bytes} of {lies.capacity_bytes} bytes on the worst core, "
        f"weights in pieces of {settled.piece} columns",
    )  # fmt: skip


def kv_bytes(
    spec: ModelSpec, wafer_spec: WaferSpec, rows: int, cols: int, lengths: Sequence[int], options: EngineOptions | None = None
) -> int:
    """Bytes of the keys and values that sequences of these lengths leave on a grid, by the cache's own count, whether they fit or not."""
    wafer = Wafer(replace(wafer_spec, sram_bytes_per_core=1 << 48), rows=rows, cols=cols, executor="dry")
    cache = shape_engine(wafer, spec, options).new_cache(np.array(lengths, np.int64))
    cache.advance(sequences_of(list(range(len(lengths))), list(lengths), [0] * len(lengths)))
    return cache.n_bytes


def smallest_square(spec: ModelSpec, wafer_spec: WaferSpec, work: Workload, options: EngineOptions) -> int | None:
    """Side of the smallest square grid that holds a workload, None if the whole wafer's largest square does not.

    Sizes double until one fits, then the gap is halved; where the last steps are not monotone (splits are uneven), the next smaller sides
    are tried too.
    """
    limit = min(wafer_spec.usable_rows, wafer_spec.usable_cols)

    def fits(side: int) -> bool:
        try:
            settle(spec, wafer_spec, side, side, work, options)
        except SramOverflowError:
            return False
        return True

    high = 1
    while not fits(high):
        if high == limit:
            return None
        high = min(2 * high, limit)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    while high > 1 and fits(high - 1):
        high -= 1
    return high


def _pass_bytes(
    spec: ModelSpec, prompt_tokens: int, batch: int, prefill_chunk: int | None, options: EngineOptions, config: Mapping[str, Any] | None
) -> tuple[int, int]:  # fmt: skip
    """Weight bytes of all forward passes of a prompt, and of a decode step after it, of one with memory tokens where there are any."""
    keeps_inputs, memory = options.kv == "recompute", spec.memory_tokens  # what is made again of inputs streams once there are any
    length = spec.sequence_length(prompt_tokens)
    tiles = batch // (options.bta_max_tile or batch)

    def alike(n: int, start: int) -> tuple[int, int]:
        """Tokens, and earlier ones, of a pass that streams what one of `n` for each of the batch does from `start` on."""
        if memory is None:
            return batch * n, int(keeps_inputs and start > 0)
        size = memory.attn_memory_chunk_size + memory.num_memory_tokens_per_chunk  # it has the same kinds of tokens, new and earlier
        return n * tiles, start if start < 2 * size else size + start % size

    starts = range(0, length, prefill_chunk or length)
    chunks = Counter(alike(n, start) for start, ((_, n),) in zip(starts, prompt_chunks((length,), prefill_chunk), strict=True))
    of_prompt = sum(times * _stream_bytes(spec, n, earlier, tiles, options, config) for (n, earlier), times in chunks.items())
    if memory is None:
        return of_prompt, _stream_bytes(spec, *alike(1, length), tiles, options, config)
    chunks_done = -(-prompt_tokens // memory.attn_memory_chunk_size)
    full = memory.length(chunks_done * memory.attn_memory_chunk_size)
    return of_prompt, _stream_bytes(spec, *alike(1 + memory.num_memory_tokens_per_chunk, full), tiles, options, config)


def _stream_bytes(
    spec: ModelSpec, n_tokens: int, earlier: int, tiles: int, options: EngineOptions, config: Mapping[str, Any] | None
) -> int:
    """Weight bytes of one forward pass over `n_tokens`, from the ledger of a dry run.

    They go through attention in so many tiles, each of which follows `earlier` ones. One layer of each kind runs, on one boundless core.
    """
    roomy = replace(WSE3, sram_bytes_per_core=1 << 48)
    wafer = Wafer(roomy, rows=1, cols=1, executor="dry")
    wafer.counts_visits = False
    few, n_alike = kinds_of_layers(spec)
    disk = None if config is None else DiskBytes(bytes_by_config(config, few), few)
    engine = shape_engine(wafer, few, replace(options, bta_max_tile=1), disk_bytes=disk)
    in_tile = n_tokens // tiles
    cache = engine.new_cache([earlier + in_tile] * tiles)
    sequences = sequences_of(list(range(tiles)), [in_tile] * tiles, [earlier] * tiles)
    trace = RoutingTrace.worst_case(len(few.moe_layers), n_tokens, spec.num_experts, spec.n_slots) if spec.is_moe else None
    engine.forward(np.zeros(n_tokens, np.int64), sequences, cache, np.array([n_tokens - 1]), trace=trace)
    rows = [row for row in wafer.ledger.totals(by=("layer", "kind")) if row["kind"] == "stream"]
    inside = sum(row["bytes"] * n_alike[row["layer"]] for row in rows if row["layer"] is not None)
    outside = sum(row["bytes"] for row in rows if row["layer"] is None)
    return int(inside + outside)


def _max_context(
    spec: ModelSpec, wafer_spec: WaferSpec, rows: int, cols: int, prompt_tokens: int, batch: int, prefill_chunk: int | None,
    options: EngineOptions,
) -> int:  # fmt: skip
    """Longest capacity for which the planned prompt chunk and the decode step still fit; what is beyond the planned prompt is generated."""
    prompt, memory = spec.sequence_length(prompt_tokens), spec.memory_tokens
    chunk = min(prefill_chunk or prompt, prompt)

    def fits(n_tokens: int, options: EngineOptions) -> bool:
        length = spec.sequence_length(n_tokens)
        step = 1 if memory is None else 1 + min(length - n_tokens, memory.num_memory_tokens_per_chunk)
        sizes = dict.fromkeys((1, step, min(chunk, length)))  # the quicker ones to refuse first
        passes = tuple(tuple((i, n) for i in range(batch)) for n in sizes)
        work = Workload(capacity=(length,) * batch, passes=passes, prompts=(min(prompt, length),) * batch, step=step)
        try:
            settle(spec, wafer_spec, rows, cols, work, options)
        except SramOverflowError:
            return False
        return True

    longest = spec.most_tokens
    finest = options if options.chunk is not None else replace(options, chunk=CHUNKS[-1])
    length = _last(0, longest, lambda n: fits(n, finest), step=rows)
    if finest is options or length == longest or not fits(length + 1, options):
        return length
    return _last(length + 1, longest, lambda n: fits(n, options), step=rows)  # coarser pieces need less here: rare, and nowhere ruled out


def _last(low: int, high: int, fits: Callable[[int], bool], *, step: int) -> int:
    """Largest number from `low`, which fits, to `high` that fits, if all up to one do.

    It is found soonest where it is a multiple of `step`: a row of cores that holds one key more.
    """
    if fits(high):
        return high
    next_is_tried = False
    while high - low > 1:
        middle = (low + high) // 2
        if high - low > step:
            middle = max(middle - middle % step, low + step - low % step)
        elif not next_is_tried:
            middle, next_is_tried = low + 1, True
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
