"""A generated continuation against the verified logits: decoding with the cache must choose what the whole sequence at once chooses."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from wse_emu.equivalence.report import StageCheck
from wse_emu.foundation.taps import TapRecord
from wse_emu.sampling import Sampler


def check_continuation(
    record: TapRecord, prompts: tuple[int, ...], sampler: Sampler, eos_token_ids: Collection[int],
    *, streams: tuple[int, ...] | None = None, memory: NDArray[np.bool_] | None = None,
) -> StageCheck:  # fmt: skip
    """Draw every generated token again, from the logits that the verified forward pass gives for its predecessor.

    Cached decode gives the bits of full recomputation, so the draw must be the same token: there is no tolerance.

    Parameters
    ----------
    record : TapRecord
        Of the sequences with their continuations.
    prompts : tuple of int
        Tokens of each sequence, in order, that were given; the others were generated.
    sampler : Sampler
        As in the generation.
    eos_token_ids : collection of int
        Tokens after one of these are filling.
    streams : tuple of int, optional
        Number of each sequence's random stream; by default its position.
    memory : ndarray of bool, (T,), optional
        Tokens of the record that the model put in itself: they are neither drawn nor drawn from.

    Returns
    -------
    StageCheck
        Of stage ``"generated"`` and kind ``"decode"``; a failure names the first token that differs.
    """
    logits: NDArray[np.float32] = record.stages[None, "logits"]
    numbers = tuple(range(len(prompts))) if streams is None else streams
    wrong: list[tuple[int, int, int]] = []
    for i, (sequence, n_prompt) in enumerate(zip(np.unique(record.seq).tolist(), prompts, strict=True)):
        at = np.flatnonzero((record.seq == sequence) if memory is None else (record.seq == sequence) & ~memory)
        tokens = record.token_ids[at]
        stream = sampler.streams([numbers[i]])
        for position in range(n_prompt, len(tokens)):
            drawn = int(sampler.sample(logits[at[position - 1]][None], stream)[0])
            if drawn != tokens[position]:
                wrong.append((int(at[position]), position, drawn))
                break
            if drawn in eos_token_ids:
                break
    if not wrong:
        return StageCheck(layer=None, stage="generated", kind="decode", status="passed")
    index, position, drawn = wrong[0]
    token = (int(record.seq[index]), int(record.pos[index]))
    return StageCheck(
        layer=None, stage="generated", kind="decode", status="failed", error=float("inf"), ratio=float("inf"), n_failed=len(wrong),
        token_index=index, token=token,
        message=f"decoding chose {int(record.token_ids[index])}, the logits of the whole sequence choose {drawn}",
    )  # fmt: skip
