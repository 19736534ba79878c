"""Where the time of a prompt and of one more token goes, stage by stage, and what bounds each stage.

    python -m benchmarks.profile_stages                    # Qwen3-MoE's form; --model Mixtral
    python -m benchmarks.profile_stages --turns 30         # more turns: of each stage of each layer the shortest counts

A stage is what the ledger calls one; its time runs while the ledger attributes events to it. Beside it stand three figures of the same run:
its time with the ``dry`` executor, which walks the same Python with the same routing and computes nothing, and the least time that its
multiply-adds and the weights that it streams would take at the machine's measured peaks. The larger of those two bounds a stage from
below; what goes beyond it and beyond Python is launches, threads that wait for each other, and kernels short of the peak. Every stage
waits for its numbers here; a run goes on with Python meanwhile, and takes less. Turns of both executors alternate. All figures are seconds
of the host: they say what this emulator costs, nothing about a wafer.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

import wse_emu as wse
from benchmarks.bench_models import CONFIGS, TINY, Sizes
from benchmarks.peaks import Machine, measure_machine
from wse_emu.wafer.ledger import ForwardPass, Ledger, NewTokens
from wse_emu.wafer.pending import Pending

OUTSIDE = "between stages"
"""Time of a forward pass that belongs to no stage: waiting for weights, handing tensors from stage to stage."""


Seconds = dict[tuple[int | None, str], float]
"""Host seconds by layer and stage."""


class TimedLedger(Ledger):
    """A ledger that also keeps the seconds of every stage of every forward pass, each with all that it asked to compute."""

    def __init__(self, pending: Pending) -> None:
        super().__init__()
        self._pending = pending
        self.seconds: list[Seconds] = []
        """Of each forward pass."""

    @contextmanager
    def scope(self, stage: str, layer: int | None = None) -> Iterator[None]:
        """Attribute events, and seconds, to a stage."""
        with super().scope(stage, layer):
            began = perf_counter()
            yield
            self._pending.finish()
            if self.seconds:
                self.seconds[-1][layer, stage] += perf_counter() - began

    @contextmanager
    def forward_pass(self, phase: str, tokens: Sequence[NewTokens]) -> Iterator[None]:
        """Mark a forward pass, and time all of it."""
        self.seconds.append(defaultdict(float))
        with super().forward_pass(phase, tokens):
            began = perf_counter()
            yield
            whole = perf_counter() - began
        self.seconds[-1][None, OUTSIDE] = whole - sum(self.seconds[-1].values())

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self.seconds.clear()


class Stage(NamedTuple):
    """Host seconds of one stage of one forward pass."""

    name: str
    seconds: float
    python: float
    """With the ``dry`` executor."""
    arithmetic: float
    """Least, at the machine's peak."""
    streaming: float
    """Least, for reading its weights once from memory."""


def stages_of(wafer: wse.Wafer, machine: Machine, best: list[Seconds], python: list[Seconds],
              which: list[int]) -> list[Stage]:  # fmt: skip
    """Stages of the forward passes `which` (alike), each layer's at its shortest."""
    assert isinstance(wafer.ledger, TimedLedger)
    one: ForwardPass = wafer.ledger.passes()[which[0]]
    totals = wafer.ledger.totals(("stage", "kind"), one.start, one.stop)
    found = []
    for name in dict.fromkeys(stage for _, stage in best[which[0]]):
        rows = [row for row in totals if row["stage"] == name]
        macs, n_bytes = sum(row["macs"] for row in rows), sum(4 * row["wavelets"] for row in rows if row["kind"] == "stream")
        keys = [key for key in best[which[0]] if key[1] == name]
        times = (sum(min(passes[i].get(key, 0.0) for i in which) for key in keys) for passes in (best, python))
        found.append(Stage(name, *times, 2 * macs / machine.whole.flops, n_bytes / machine.whole.bytes))
    return found


def keep_shortest(best: list[Seconds], seconds: list[Seconds]) -> None:
    """Lower `best` to what one more turn took."""
    if not best:
        best.extend(dict.fromkeys(times, math.inf) for times in seconds)
    for shortest, times in zip(best, seconds, strict=True):
        for key, took in times.items():
            shortest[key] = min(shortest[key], took)


def lines(title: str, stages: Sequence[Stage]) -> Iterator[str]:
    """The table of one kind of forward pass; times in milliseconds."""
    whole = sum(stage.seconds for stage in stages)
    yield f"{title}: {1e3 * whole:.1f} ms"
    yield f"  {'':16}{'ms':>8}{'share':>7}{'python':>8}{'arithmetic':>12}{'streaming':>11}   of bound"
    total = Stage("all", *(sum(values) for values in zip(*(stage[1:] for stage in stages), strict=True)))
    for stage in (*stages, total):
        bound = max(stage.arithmetic, stage.streaming)
        kept = f"{bound / stage.seconds:9.0%} {'flops' if stage.arithmetic >= stage.streaming else 'bytes'}" if bound else ""
        if stage is total:
            kept = ""
        yield (
            f"  {stage.name:16}{1e3 * stage.seconds:8.2f}{stage.seconds / whole:7.0%}{1e3 * stage.python:8.2f}"
            f"{1e3 * stage.arithmetic:12.2f}{1e3 * stage.streaming:11.2f}   {kept}".rstrip()
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Save a model, run it in turns with both executors, print a table for the prompt and one for the tokens after it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(CONFIGS), default="Qwen3-MoE")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: to see that it works")
    args = parser.parse_args(argv)
    sizes = Sizes(2, 3, 6, 3) if args.smoke else Sizes(32, 32, 512, 9)
    config = {**CONFIGS[args.model], **TINY} if args.smoke else CONFIGS[args.model]
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], sizes.n_prompt)
    machine = measure_machine(smoke=args.smoke)
    with tempfile.TemporaryDirectory(prefix="wse-emu-profile-") as name:
        directory = Path(name)
        wse.from_config(config, seed=0).save(directory / "model", dtype="bfloat16")
        wafers = {executor: wse.Wafer(wse.WSE3, rows=sizes.rows, cols=sizes.cols, executor=executor) for executor in ("batched", "dry")}
        models = {}
        for executor, wafer in wafers.items():
            wafer.ledger = TimedLedger(wafer.pending)
            models[executor] = wse.from_pretrained(directory / "model", wafer=wafer, cache_dir=directory)
        batched, dry = models["batched"], models["dry"]
        batched.generate(ids, max_new_tokens=sizes.n_new)  # compiles
        routing = batched.recorded_routing
        best: list[Seconds] = []
        python: list[Seconds] = []
        for _ in range(args.turns):
            for wafer in wafers.values():
                wafer.ledger.clear()
            batched.generate(ids, max_new_tokens=sizes.n_new)
            keep_shortest(best, wafers["batched"].ledger.seconds)
            dry.generate(ids, max_new_tokens=sizes.n_new, routing=routing)
            keep_shortest(python, wafers["dry"].ledger.seconds)
        machine = machine.better(measure_machine(smoke=args.smoke))
        assert wafers["batched"].ledger.events() == wafers["dry"].ledger.events(), "the dry run did other work"
        print(f"{args.model}, {sizes.rows} x {sizes.cols} cores; shortest of {args.turns} turns; "
              f"peaks {machine.whole.flops / 1e9:.0f} GFLOP/s and {machine.whole.bytes / 1e9:.1f} GB/s")  # fmt: skip
        for title, which in ((f"prompt of {sizes.n_prompt}", [0]), ("one more token", list(range(1, sizes.n_new)))):
            for line in lines(title, stages_of(wafers["batched"], machine, best, python, which)):
                print(line)
        batched.close()


if __name__ == "__main__":
    main()
