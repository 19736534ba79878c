"""Options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, cast

import typer

from wse_emu.foundation.precision import FLOAT32, Precision, PrecisionOptLevel
from wse_emu.foundation.wafer_spec import WSE2, WSE3, WaferSpec

if TYPE_CHECKING:
    from wse_emu.engine.options import EngineOptions
    from wse_emu.foundation.moe_config import MoEConfig
    from wse_emu.foundation.routing_rule import RoutingRule

MoeName = Literal["functional", "experimental", "optimized"]

SHIPPED_MODEL = "pydoc-moe-8x2"
SHIPPED_PROMPT = "If the argument"
OTHER_PROMPT = "Once upon a time"


class WaferName(StrEnum):
    """Wafers that ``--wafer`` offers."""

    WSE2 = "wse2"
    WSE3 = "wse3"

    @property
    def spec(self) -> WaferSpec:
        """The wafer's specification."""
        return {WaferName.WSE2: WSE2, WaferName.WSE3: WSE3}[self]


class Executor(StrEnum):
    """Ways to run a launch; all give the same bits."""

    BATCHED = "batched"
    ISOLATED = "isolated"
    INTERPRETED = "interpreted"


class StreamExperts(StrEnum):
    """Which experts MemoryX streams."""

    ACTIVATED = "activated"
    ALL = "all"


class NumberFormat(StrEnum):
    """Formats in which ``--dtype`` and ``--kv-dtype`` store numbers."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    CB16 = "cb16"


class Implementation(StrEnum):
    """Ways in which experts find their tokens."""

    FUNCTIONAL = "functional"
    EXPERIMENTAL = "experimental"
    OPTIMIZED = "optimized"


class Growth(StrEnum):
    """Ways in which keys and values take in new tokens."""

    SHIFT = "shift"
    CONCAT = "concat"


class Keeping(StrEnum):
    """What is kept of a token for later ones."""

    STORE = "store"
    RECOMPUTE = "recompute"


class Placing(NamedTuple):
    """Where and how a model runs, as the options say."""

    rows: int | None = None
    cols: int | None = None
    wafer: WaferName = WaferName.WSE3
    executor: Executor = Executor.BATCHED
    stream_experts: StreamExperts = StreamExperts.ACTIVATED
    prefill_chunk: int | None = None
    precision: Precision = FLOAT32
    kv_growth: Growth = Growth.SHIFT
    kv: Keeping = Keeping.STORE
    skip_zero_weights: bool = False
    routing: RoutingRule | MoEConfig | None = None
    """Another rule than the checkpoint's."""
    moe_implementation: Implementation | None = None
    bta_max_tile: int | None = None

    @property
    def implementation(self) -> MoeName:
        """How experts are run: as asked for, or as ModelZoo's options say."""
        from wse_emu.foundation.moe_config import MoEConfig

        said = self.routing.moe_implementation if isinstance(self.routing, MoEConfig) else "experimental"
        return said if self.moe_implementation is None else self.moe_implementation.value

    @property
    def engine(self) -> EngineOptions:
        """What of it an engine, or a plan, is told."""
        from wse_emu.engine.options import EngineOptions

        return EngineOptions(
            precision=self.precision, kv_growth=self.kv_growth.value, kv=self.kv.value, bta_max_tile=self.bta_max_tile,
            moe_implementation=self.implementation,
        )  # fmt: skip


_SHIPPED = "without it, the small model that ships with the package"
_EXECUTORS = "batched: all cores in one compiled loop; isolated: one core at a time in its own 48 KiB; interpreted: plain Python."

Model = Annotated[Path | None, typer.Argument(metavar="MODEL", help=f"Checkpoint directory (Hugging Face); {_SHIPPED}.")]
ModelOrConfig = Annotated[Path, typer.Argument(metavar="MODEL_OR_CONFIG", help="Checkpoint directory or config.json; no weights are read.")]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue; needs the checkpoint's tokenizer.json.")]
Ids = Annotated[
    Path | None,
    typer.Option("--ids", metavar="FILE", help="Continue token ids instead: a JSON list, or numbers between blanks; '-' reads stdin."),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Tokens to generate at most; end of sequence stops earlier.")
]
Rows = Annotated[
    int | None, typer.Option("--rows", metavar="N", min=1, help="Rows of cores; alone: a square. Default: the smallest square that fits.")
]
Cols = Annotated[int | None, typer.Option("--cols", metavar="N", min=1, help="Columns of cores; alone: a square.")]
Wafer = Annotated[WaferName, typer.Option("--wafer", help="Which wafer's limits apply.")]
Execution = Annotated[Executor, typer.Option("--executor", help=_EXECUTORS)]
Dtype = Annotated[
    NumberFormat,
    typer.Option("--dtype", help="Format in which activations are stored. cb16: 6 exponent bits, 9 of the mantissa."),
]
KvDtype = Annotated[NumberFormat | None, typer.Option("--kv-dtype", help="Format of keys and values; by default as --dtype.")]
OptLevel = Annotated[
    int,
    typer.Option(
        "--precision-opt-level", min=0, max=2,
        help="Sums in 16 bits, with a --dtype of 16 bits: 0 none, 1 what rows of cores hand on of matrix products, 2 softmax too.",
    ),
]  # fmt: skip
KvGrowth = Annotated[
    Growth,
    typer.Option("--kv-growth", help="shift: keys and values stay balanced over rows; concat: what is generated goes to the last row."),
]
Kv = Annotated[
    Keeping, typer.Option("--kv", help="Keep keys and values, or the inputs that they are made of, and make them again in every pass.")
]
SkipZeros = Annotated[
    bool, typer.Option("--skip-zero-weights", help="Leave weights that are zero behind when matrices stream; the result has the same bits.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", help="Sample at this temperature; 0, or no sampling option at all: take the most probable."),
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Sample among the k most probable tokens.")]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Sample among the most probable tokens that sum to this probability.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the sampling.")]
Streamed = Annotated[StreamExperts, typer.Option("--stream-experts", help="Stream the experts that some token chose, or all.")]
PrefillChunk = Annotated[
    int | None, typer.Option("--prefill-chunk", metavar="N", min=1, help="Take the prompt in chunks of so many tokens; needs less SRAM.")
]
MoeImplementation = Annotated[
    Implementation | None,
    typer.Option("--moe-implementation", help="How experts find their tokens: all computed and masked, searched (default), sorted once."),
]
BtaMaxTile = Annotated[
    int | None, typer.Option("--bta-max-tile", metavar="N", min=1, help="Sequences that go through attention together; divides the batch.")
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Hold every layer against the dense float64 reference.")]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout and nothing else.")]
LedgerFile = Annotated[Path | None, typer.Option("--ledger", metavar="FILE", help="Also write the whole ledger of the generation as JSON.")]
TraceFile = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="Also write the generation as a trace for Perfetto, in logical time (JSON).")
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Also write one self-contained page about the run (HTML).")
]
PromptTokens = Annotated[
    int | None,
    typer.Option("--prompt-tokens", metavar="N", min=1, help="Tokens of each prompt. Default: 512, or as many as the model takes."),
]
NewTokens = Annotated[int, typer.Option("--new-tokens", metavar="N", min=0, help="Tokens to generate after it.")]
Batch = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Sequences at once.")]
Clear = Annotated[bool, typer.Option("--clear", help="Remove everything listed; it is made again when needed.")]


def precision(dtype: NumberFormat, kv_dtype: NumberFormat | None, level: int) -> Precision:
    """Formats and sums as asked for."""
    return Precision(
        dtype=dtype.value, kv_dtype=None if kv_dtype is None else kv_dtype.value, precision_opt_level=cast(PrecisionOptLevel, level)
    )


def grid(rows: int | None, cols: int | None) -> tuple[int | None, int | None]:
    """Rows and columns as asked for; one of them alone asks for a square."""
    return (rows or cols), (cols or rows)


def shipped_model() -> Path:
    """Directory of the model that ships with the package."""
    from importlib.resources import files

    return Path(str(files("wse_emu") / "data" / SHIPPED_MODEL))


def held_out_text() -> str:
    """A text of some 256 tokens that the shipped model was not trained on."""
    import json

    from wse_emu.cli.tokens import load_tokenizer

    directory = shipped_model()
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None  # it ships
    return tokenizer.decode(json.loads((directory / "heldout.json").read_text(encoding="utf-8"))["ids"][0])
