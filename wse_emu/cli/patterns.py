"""Options that say which keys queries attend to, and the model that has such patterns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from wse_emu.cli.tokens import read_text
from wse_emu.foundation.arguments import show
from wse_emu.foundation.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wse_emu.cli.load import Request
    from wse_emu.foundation.attention_pattern import AttentionPattern
    from wse_emu.foundation.model_spec import ModelSpec

_LAYERS = re.compile("([0-9]{1,9})(?:-([0-9]{1,9}))?")

Window = Annotated[
    int | None, typer.Option("--window", metavar="N", min=1, help="Attention: every query sees so many keys, its own included.")
]
Sinks = Annotated[int, typer.Option("--sinks", metavar="N", min=0, help="Attention: and the first so many keys; with a window or chunks.")]
ChunkSize = Annotated[
    int | None,
    typer.Option("--attention-chunk-size", metavar="N", min=1, help="Attention: every query sees the keys of its own chunk of so many."),
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", metavar="SPACING:WIDTH", help="Attention: and WIDTH keys from every SPACING-th on; with a window or chunks."),
]
Fixed = Annotated[
    str | None,
    typer.Option(
        "--fixed", metavar="CTX:VERT[:NUM_VERTS]",
        help="Attention: GPT-3's fixed pattern, blocks of CTX keys and the last VERT of each; other ones for every head of NUM_VERTS.",
    ),
]  # fmt: skip
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention", metavar="JSON",
        help="Attention: the fields of an AttentionPattern, or a list with one for each layer (null: as the model has it); @FILE reads it.",
    ),
]  # fmt: skip
DenseLayers = Annotated[
    str | None, typer.Option("--dense-layers", metavar="LIST", help="With a pattern: layers that see every key, as 0,5,8-11.")
]
SparseLayers = Annotated[
    str | None, typer.Option("--sparse-layers", metavar="LIST", help="With a pattern: layers that have it; the others stay as they are.")
]


class PatternOptions(NamedTuple):
    """What was asked of attention."""

    window: int | None = None
    sinks: int = 0
    attention_chunk_size: int | None = None
    columns: str | None = None
    fixed: str | None = None
    attention: str | None = None
    dense_layers: str | None = None
    sparse_layers: str | None = None

    @property
    def names_a_pattern(self) -> bool:
        """Whether there is a pattern at all."""
        return any(value is not None for value in (self.window, self.attention_chunk_size, self.fixed, self.attention))

    @property
    def words(self) -> list[str]:
        """The options that were given, as the command line has them."""
        given = [(name, value) for name, value in self._asdict().items() if value not in (None, 0)]
        return [word for name, value in given for word in (f"--{name.replace('_', '-')}", str(value))]

    def applied(self, spec: ModelSpec) -> ModelSpec:
        """The model with these patterns; itself where none is asked for.

        Raises
        ------
        InputError, SpecError
            If options contradict each other, do not parse, or make no pattern of this model.
        """
        if self.dense_layers is not None and self.sparse_layers is not None:
            raise InputError("--dense-layers and --sparse-layers both say which layers have the pattern; give one of them")
        found = self.patterns(spec)
        if found is None:
            if self.dense_layers is not None or self.sparse_layers is not None:
                name = "--dense-layers" if self.dense_layers is not None else "--sparse-layers"
                raise InputError(f"{name} goes with a pattern: --window, --attention-chunk-size, --fixed or --attention")
            return spec
        if isinstance(found, list):
            if self.sparse_layers is not None:
                raise InputError("--sparse-layers goes with one pattern; the list of --attention has one for each layer, null where none")
            own = [spec.pattern(layer) if one is None and layer < spec.num_layers else one for layer, one in enumerate(found)]
            if len(own) != spec.num_layers:
                raise InputError(f"--attention: must have one pattern for each of {spec.num_layers} layers, has {len(own)}")
            return spec.with_attention([one for one in own if one is not None], self._layers("--dense-layers", self.dense_layers, spec))
        if self.sparse_layers is not None:
            return spec.with_sparse_layers(found, self._layers("--sparse-layers", self.sparse_layers, spec))
        return spec.with_attention(found, self._layers("--dense-layers", self.dense_layers, spec))

    def of(self, request: Request) -> Request:
        """The request, its model with these patterns; raises as `applied`."""
        return request._replace(spec=self.applied(request.spec))

    def patterns(self, spec: ModelSpec) -> AttentionPattern | list[AttentionPattern | None] | None:
        """The pattern, or one for each layer; None where none is asked for.

        Raises
        ------
        InputError, SpecError
            As `applied`.
        """
        from wse_emu.foundation.attention_pattern import AttentionPattern
        from wse_emu.foundation.pattern_json import patterns_from_json

        local = {"--window": self.window, "--attention-chunk-size": self.attention_chunk_size}
        more = {"--sinks": self.sinks or None, "--columns": self.columns}
        given = [name for name, value in (local | more).items() if value is not None]
        for name, value in (("--attention", self.attention), ("--fixed", self.fixed)):
            others = [*given, *(["--fixed"] if name == "--attention" and self.fixed is not None else [])]
            if value is not None and others:
                raise InputError(f"{name} is a whole pattern; leave out {', '.join(others)}, or leave {name} out")
        if self.attention is not None:
            return patterns_from_json(_json(self.attention), where="--attention")
        if self.fixed is not None:
            return self._fixed(self.fixed, spec)
        if not given:
            return None
        if all(value is None for value in local.values()):
            raise InputError(f"{given[0]} adds keys to a local part: give --window or --attention-chunk-size too")
        if all(value is not None for value in local.values()):
            raise InputError("--window and --attention-chunk-size are two local parts; give one of them")
        spacing, width = (None, None) if self.columns is None else _numbers("--columns", self.columns, (2,), "SPACING:WIDTH")
        return AttentionPattern(
            window=self.window, chunk=self.attention_chunk_size, sinks=self.sinks, column_spacing=spacing, column_width=width
        )

    @staticmethod
    def _fixed(text: str, spec: ModelSpec) -> AttentionPattern:
        from wse_emu.foundation.attention_pattern import AttentionPattern

        context, width, *subsets = _numbers("--fixed", text, (2, 3), "CTX:VERT[:NUM_VERTS]")
        if not subsets:
            return AttentionPattern.fixed(local_attn_ctx=context, vert_size=width)
        return AttentionPattern.fixed_per_head(num_heads=spec.num_heads, num_verts=subsets[0], local_attn_ctx=context, vert_size=width)

    @staticmethod
    def _layers(option: str, text: str | None, spec: ModelSpec) -> list[int]:
        layers: list[int] = []
        for word in (text or "").replace(" ", "").split(","):
            if not word:
                continue
            found = _LAYERS.fullmatch(word)
            if found is None:
                raise InputError(f"{option} must be layers between commas, as 0,5,8-11; got {show(text)}")
            first, last = int(found[1]), int(found[2] or found[1])
            if not first <= last < spec.num_layers:
                raise InputError(f"{option} must name layers in 0..{spec.num_layers - 1}, ascending, got {show(word)}")
            layers += range(first, last + 1)
        return layers


def layers_text(layers: Iterable[int]) -> str:
    """Ascending layers as ``--sparse-layers`` takes them.

    >>> layers_text([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _numbers(option: str, text: str, counts: tuple[int, ...], form: str) -> list[int]:
    words = text.split(":")
    if len(words) not in counts or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise InputError(f"{option} must be {form}, positive integers, got {show(text)}")
    return [int(word) for word in words]


def _json(text: str) -> Any:
    """What ``--attention`` says: JSON, or a file with it behind an ``@``."""
    from wse_emu.checkpoint.jsonfile import parse_json

    where = "--attention"
    if text.startswith("@"):
        where, text = f"{where} {text}", read_text(Path(text[1:]), where=f"{where} {text}")
    return parse_json(text.encode("utf-8", "surrogateescape"), where=where, error=InputError)
