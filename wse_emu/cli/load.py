"""From options to a model on a wafer: shapes first, then the plan, then the weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from wse_emu.cli.options import OTHER_PROMPT, SHIPPED_PROMPT, Growth, Placing, grid, shipped_model
from wse_emu.cli.tokens import CheckpointTokenizer, encode, load_tokenizer, read_ids, read_text
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import CheckpointError, InputError, SramOverflowError

if TYPE_CHECKING:
    from wse_emu.foundation.model_spec import ModelSpec
    from wse_emu.model import WaferModel


_SHOWN = 4
"""Names of tensors in one line."""


class Progress(Protocol):
    """What is called while a long preparation goes on."""

    def __call__(self, done_bytes: int, total_bytes: int, /) -> None:
        """Say that `done_bytes` of `total_bytes` are done."""


class Request(NamedTuple):
    """Token ids to start from, and the tokenizer if there is one."""

    path: Path
    spec: ModelSpec
    ids: list[int]
    text: str | None
    """The prompt as text; None if it was given as ids."""
    tokenizer: CheckpointTokenizer | None


def read_request(
    model: Path | None, prompt: str | None, ids: Path | None, text_file: Path | None = None, fallback: Callable[[], str] | None = None
) -> Request:
    """Resolve MODEL, ``--prompt``, ``--ids`` and ``--text``; reads config.json and tokenizer.json, no weights.

    Where none of them is given, the text is that of `fallback`, as far as the model has positions for it; or else a few words.

    Raises
    ------
    InputError
        If more than one of them is given, or the ids do not fit the model's vocabulary.
    ConfigError, CheckpointError
        If the checkpoint cannot be read.
    """
    from wse_emu.checkpoint import read_config

    given = [name for name, value in (("--prompt", prompt), ("--ids", ids), ("--text", text_file)) if value is not None]
    if len(given) > 1:
        raise InputError(f"`{given[0]}` and `{given[1]}` both say where to start; give one of them")
    path = shipped_model() if model is None else model
    _, spec = read_config(path)
    if path.is_file():
        raise CheckpointError(f"{path}: a file; weights and tokenizer lie in its directory, {path.absolute().parent}: give that")
    tokenizer = load_tokenizer(path)
    text: str | None = None
    if ids is not None:
        tokens = read_ids(ids)
    elif text_file is not None:
        text = read_text(text_file, where=f"--text {text_file}")
        tokens = encode(tokenizer, text, path, "--text")
    elif prompt is None and fallback is not None:
        text = fallback()
        tokens = encode(tokenizer, text, path)[: spec.context_length]
    else:
        text = prompt if prompt is not None else (SHIPPED_PROMPT if model is None else OTHER_PROMPT)
        tokens = encode(tokenizer, text, path)
    outside = [i for i in tokens if i >= spec.vocab_size]
    if outside:
        raise InputError(f"token id {show(outside[0])} lies outside the model's vocabulary of {spec.vocab_size}")
    return Request(path, spec, tokens, text, tokenizer)


def load(request: Request, placing: Placing, *, new_tokens: int, verify: bool, quiet: bool) -> WaferModel:
    """Put the model, with the request's patterns, on a wafer that holds it with the prompt and `new_tokens` more.

    With `verify`, all of them in one forward pass.

    Raises
    ------
    InputError
        If the sequence would be longer than the model's positions.
    SramOverflowError
        If no grid, or not the one asked for, holds it.
    """
    import wse_emu as wse
    from wse_emu.engine.plan import plan_model

    n_prompt = len(request.ids)
    request.spec.check_length(n_prompt, new_tokens)
    tell_of_a_cold_start(quiet=quiet)
    rows, cols = grid(placing.rows, placing.cols)
    work = [(n_prompt + new_tokens, 0, True)] if verify else []
    if not verify or placing.kv_growth == Growth.CONCAT:  # where nothing shifts, generating may need more than a prompt of all tokens
        work.append((n_prompt, new_tokens, False))
    plans = [
        plan_model(
            request.spec,
            wafer_spec=placing.wafer.spec,
            rows=rows,
            cols=cols,
            prompt_tokens=prompt,
            new_tokens=new,
            verify=verified,
            prefill_chunk=placing.prefill_chunk,
            options=placing.engine,
        )
        for prompt, new, verified in work
    ]
    plan = max(plans, key=lambda plan: (not plan.fits, plan.rows))
    if not plan.fits:
        raise SramOverflowError(plan.message)
    with progress_bar("weights to wafer layout", quiet=quiet) as progress:
        model = wse.from_pretrained(
            request.path,
            wafer=wse.Wafer(placing.wafer.spec, rows=plan.rows, cols=plan.cols, executor=placing.executor.value),
            max_tokens=n_prompt + new_tokens,
            routing=placing.routing,
            moe_implementation=placing.engine.moe_implementation,
            bta_max_tile=placing.bta_max_tile,
            stream_experts=placing.stream_experts.value,
            prefill_chunk=placing.prefill_chunk,
            attention=request.spec.patterns or None,
            dtype=placing.precision.dtype,
            kv_dtype=placing.precision.kv_dtype,
            precision_opt_level=placing.precision.precision_opt_level,
            kv_growth=placing.kv_growth.value,
            kv=placing.kv.value,
            skip_zero_weights=placing.skip_zero_weights,
            progress=progress,
        )
    if model.checkpoint.ignored and not quiet:
        print(left_out(model.checkpoint.ignored), file=sys.stderr)
    return model


def left_out(names: Sequence[str]) -> str:
    """What to say of tensors, and of fields of config.json, that transformers leaves out too."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"left out, as transformers does: {', '.join(names[:_SHOWN])}{more}"


def tell_of_a_cold_start(*, quiet: bool) -> None:
    """Say on stderr, if that is a terminal, why the first token of a fresh installation takes its time."""
    if quiet or not sys.stderr.isatty():
        return
    from wse_kernels import _cache as kernels

    if not any(entry.is_current for entry in kernels.cache_entries()):
        print(f"first run: the kernels are compiled now and kept in {kernels.kernels_root()}", file=sys.stderr)


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Progress | None]:
    """Progress of bytes on stderr, if that is a terminal; None where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def update(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes, visible=True)

        yield update
