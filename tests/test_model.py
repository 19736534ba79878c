"""The face: what a call gives back, what it refuses by name, where it runs, when it stops, and what it leaves on the wafer."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import wse_emu as wse
from wse_emu.checkpoint import random_checkpoint
from wse_emu.engine.options import EngineOptions
from wse_emu.engine.plan import Workload, plan_model, smallest_square
from wse_emu.engine.routing_trace import RoutingTrace
from wse_emu.memoryx import ShapeStore
from wse_emu.testing import write_checkpoint

CONFIG = {
    "model_type": "mixtral", "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "num_local_experts": 5, "num_experts_per_tok": 2, "eos_token_id": None, "initializer_range": 0.4,
}  # fmt: skip
DENSE = {key: value for key, value in CONFIG.items() if "experts" not in key} | {"model_type": "llama"}
IDS = np.array([[3, 14, 15, 9, 2], [0, 0, 6, 5, 35]])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def make(executor: str = "batched", rows: int = 3, cols: int = 2, *, dense: bool = False, spec=wse.WSE3, changes=(), **options):
    """The same random model; `changes` to its config."""
    wafer = wse.Wafer(spec, rows=rows, cols=cols, executor=executor)
    return wse.from_config((DENSE if dense else CONFIG) | dict(changes), seed=3, wafer=wafer, **options)


@pytest.fixture(scope="module")
def model() -> wse.WaferModel:
    return make()


def assert_clean(wafer: wse.Wafer) -> None:
    """Nothing lies on any core: neither in the account nor, one core at a time, in an arena; and no thread goes on."""
    assert not wafer.sram.live
    assert wafer.sram.used_bytes() == wafer.spec.base_code_bytes
    assert not [thread for thread in threading.enumerate() if thread.name == "memoryx-prefetch"]
    if wafer.cores is not None:
        free = wafer.spec.sram_bytes_per_core - wafer.spec.base_code_bytes
        for row, col in np.ndindex(wafer.rows, wafer.cols):
            arena = wafer.cores.arena(row, col)
            arena.free(arena.allocate("everything", (free,), np.uint8))


# ---- what a call gives back


@pytest.mark.parametrize("dense", [False, True])
def test_shapes_and_types_of_everything_asked_for(dense: bool) -> None:
    out = make(dense=dense)(IDS, MASK, output_hidden_states=True, output_router_logits=True)
    assert (out.logits.shape, out.logits.dtype) == ((2, 5, 60), np.float32)
    assert [h.shape for h in out.hidden_states] == [(2, 5, 24)] * 3
    n_moe = 0 if dense else 2
    assert [r.shape for r in out.router_logits] == [(2, 5, 5)] * n_moe
    assert [i.shape for i in out.topk_ids] == [w.shape for w in out.topk_weights] == [(2, 5, 2)] * n_moe
    assert all(i.dtype == np.int64 for i in out.topk_ids)
    for values in (out.logits, *out.hidden_states, *out.router_logits, *out.topk_weights):
        assert values.dtype == np.float32
        assert not values[1, :2].any(), "padding holds zeros"
        assert values[MASK.astype(bool)].any(axis=-1).all()


def test_what_was_not_asked_for_is_none(model: wse.WaferModel) -> None:
    out = model(IDS)
    assert out.hidden_states is None
    assert out.router_logits is None
    assert len(out.topk_ids) == len(out.topk_weights) == 2


def test_hidden_states_begin_with_the_embedding_and_router_logits_explain_the_choice(model: wse.WaferModel) -> None:
    out = model(IDS, MASK, output_hidden_states=True, output_router_logits=True)
    table = model.checkpoint.tensors.read("model.embed_tokens.weight")
    real = MASK.astype(bool)
    np.testing.assert_array_equal(out.hidden_states[0][real], table[IDS[real]])
    for logits, ids, weights in zip(out.router_logits, out.topk_ids, out.topk_weights, strict=True):
        np.testing.assert_array_equal(ids[real], np.argsort(-logits[real], axis=-1, kind="stable")[:, :2])
        assert (np.diff(weights[real], axis=-1) <= 0).all()


def test_one_prompt_needs_no_batch_axis(model: wse.WaferModel) -> None:
    """A forward pass gives one back all the same; generate answers in the form of the prompt."""
    flat, batched = model(IDS[0]), model(IDS[:1])
    assert flat.logits.shape == (1, 5, 60)
    np.testing.assert_array_equal(flat.logits, batched.logits)
    np.testing.assert_array_equal(model.generate(IDS[0], 3), model.generate(IDS[:1], 3)[0])
    assert model.generate(IDS[0].tolist(), 3).shape == (8,)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_any_integers_are_ids(model: wse.WaferModel, dtype: type) -> None:
    ids = model.generate(IDS.astype(dtype), 2)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, model.generate(IDS.tolist(), 2))


@pytest.mark.parametrize("mask", [MASK, MASK.astype(bool), MASK.astype(np.uint8).tolist()])
def test_any_zeros_and_ones_are_a_mask(model: wse.WaferModel, mask: Any) -> None:
    np.testing.assert_array_equal(model(IDS, mask).logits, model(IDS, MASK).logits)


def test_a_mask_of_one_axis_goes_with_a_prompt_of_one_axis(model: wse.WaferModel) -> None:
    np.testing.assert_array_equal(model(IDS[1], MASK[1]).logits[0, 2:], model(IDS[1, 2:]).logits[0])
    np.testing.assert_array_equal(model.generate(IDS[1], 2, attention_mask=MASK[1])[-2:], model.generate(IDS[1, 2:], 2)[-2:])


def test_what_stands_at_padding_does_not_matter(model: wse.WaferModel) -> None:
    """Any id at all, also one outside the vocabulary; generate gives it back as it came."""
    padded = np.where(MASK == 1, IDS, -100)
    np.testing.assert_array_equal(model(padded, MASK).logits, model(IDS, MASK).logits)
    assert model.generate(padded, 1, attention_mask=MASK)[1, :2].tolist() == [-100, -100]


def test_repr_names_the_model_and_the_wafer(model: wse.WaferModel) -> None:
    assert repr(model) == f"WaferModel(mixtral, {model.spec.n_params:,} parameters, {model.wafer!r})"


# ---- generate


@pytest.mark.parametrize("prefill_chunk", [None, 2])
@pytest.mark.parametrize("dense", [False, True])
def test_greedy_tokens_are_the_largest_logits_of_the_whole_sequence(dense: bool, prefill_chunk: int | None) -> None:
    model = make(dense=dense, prefill_chunk=prefill_chunk)
    ids = IDS
    mask = MASK
    for _ in range(4):
        following = model(ids, mask).logits[:, -1].argmax(axis=-1)
        ids, mask = np.column_stack([ids, following]), np.column_stack([mask, [1, 1]])
    generated = model.generate(IDS, 4, attention_mask=MASK)
    np.testing.assert_array_equal(generated, ids)
    assert len(set(generated[:, 5:].ravel().tolist())) > 2, "the model says more than one word"


def test_on_token_sees_every_step_and_may_keep_what_it_sees(model: wse.WaferModel) -> None:
    seen: list[tuple[int, np.ndarray]] = []
    ids = model.generate(IDS, 3, on_token=lambda step, column: seen.append((step, column)))
    assert [step for step, _ in seen] == [0, 1, 2]
    np.testing.assert_array_equal(np.stack([column for _, column in seen], axis=1), ids[:, 5:])


def test_a_callback_cannot_change_what_is_generated(model: wse.WaferModel) -> None:
    np.testing.assert_array_equal(model.generate(IDS, 3, on_token=lambda _, column: column.fill(0)), model.generate(IDS, 3))


def endings() -> tuple[np.ndarray, list[int], list[int]]:
    """Free tokens of both sequences, an end for each that the other never says, and the steps, not the same, at which they come first."""
    free = make().generate(IDS, 8)[:, 5:]
    ends, at = [], []
    for row, other, step in ((free[0], free[1], 1), (free[1], free[0], 4)):
        said = row.tolist()
        ends.append(next(t for t in said[step:] if said.index(t) >= step and t not in other))
        at.append(said.index(ends[-1]))
    assert 0 < at[0] < at[1] < 7
    return free, ends, at


@pytest.mark.parametrize("pad", [None, 7])
def test_each_sequence_ends_at_its_own_end_token_and_is_filled_up(pad: int | None) -> None:
    """With the padding token, or without one with the first end token; all ended is the end."""
    free, ends, at = endings()
    model = make(changes={"eos_token_id": ends, "pad_token_id": pad})
    columns: list[list[int]] = []
    ids = model.generate(IDS, 8, on_token=lambda _, column: columns.append(column.tolist()))[:, 5:]
    assert ids.shape == (2, max(at) + 1)
    fill = ends[0] if pad is None else pad
    for row, said, end in zip(ids.tolist(), free.tolist(), at, strict=True):
        assert row == said[: end + 1] + [fill] * (max(at) - end)
    assert np.array(columns).T.tolist() == ids.tolist()
    assert_clean(model.wafer)


def test_a_sequence_that_ended_does_no_more_work() -> None:
    """The other goes on as if it were alone, and the wafer works for one token instead of two."""
    free, ends, at = endings()
    model = make(changes={"eos_token_id": [ends[0]], "pad_token_id": 0}, stream_experts="all")
    marks: list[int] = []
    ids = model.generate(IDS, 8, on_token=lambda *_: marks.append(len(model.wafer.ledger)))
    np.testing.assert_array_equal(ids[1, 5:], free[1])
    work = [
        sum(e.macs for e in model.wafer.ledger.events()[a:b] if e.name == "partial_matmul" and e.stage != "router")
        for a, b in pairwise(marks)
    ]  # one number for each decode step; rows that hold the same token all compute its few router scores
    assert set(work[: at[0]]) == {work[0]}
    assert set(work[at[0] :]) == {work[0] // 2}


def test_one_end_token_and_the_last_step_agree() -> None:
    """An end at the very last step asked for gives the same array as no end at all."""
    _, ends, at = endings()
    model, n = make(changes={"eos_token_id": ends[0]}), at[0] + 1
    np.testing.assert_array_equal(model.generate(IDS[0], n), make().generate(IDS[0], n))
    assert model.generate(IDS[0], n + 4).shape == (5 + n,)


def test_a_sampler_draws_and_a_seed_draws_again(model: wse.WaferModel) -> None:
    drawn = [model.generate(IDS, 6, sampler=wse.Sampler(temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    np.testing.assert_array_equal(model.generate(IDS, 6, sampler=wse.Sampler(top_k=1)), model.generate(IDS, 6))


@pytest.mark.parametrize("sampler", [None, wse.Sampler(temperature=2.0)])
def test_the_dry_executor_generates_zeros_and_never_ends_early(sampler: wse.Sampler | None) -> None:
    dry = make("dry", changes={"eos_token_id": 0})
    assert dry.generate(IDS, 3, sampler=sampler)[:, 5:].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert not dry(IDS).logits.any()


# ---- options change no value


@pytest.mark.parametrize(
    "options",
    [{"stream_experts": "all"}, {"prefill_chunk": 1}, {"prefill_chunk": 3}, {"chunk": 2}, {"prefetch_depth": 0}, {"max_tokens": 9}],
)
def test_no_option_changes_a_value(model: wse.WaferModel, options: dict[str, Any]) -> None:
    other = make(**options)
    np.testing.assert_array_equal(other(IDS, MASK).logits, model(IDS, MASK).logits)
    np.testing.assert_array_equal(other.generate(IDS, 4, attention_mask=MASK), model.generate(IDS, 4, attention_mask=MASK))


def test_streaming_all_experts_streams_every_one_whatever_was_chosen() -> None:
    names = {}
    for policy in ("activated", "all"):
        model = make(stream_experts=policy)
        out = model(IDS[0, :1])
        names[policy] = {e.name for e in model.wafer.ledger.events() if e.kind == "stream" and ".experts." in e.name}
        control = {e.kind for e in model.wafer.ledger.events()} & {"control"}
        assert bool(control) == (policy == "activated"), "MemoryX is told what was chosen only if it asks"
    chosen = {f"layers.{i}.experts.{e}.w_{m}" for i, ids in enumerate(out.topk_ids) for e in ids.ravel() for m in ("gate_up", "down")}
    assert names["activated"] == chosen
    assert len(names["all"]) == 2 * 5 * 2


# ---- where it runs


def test_without_a_wafer_the_smallest_square_is_taken_and_grows_with_the_prompt() -> None:
    config = CONFIG | {"max_position_embeddings": 2000}
    model = wse.from_config(config)
    long = np.arange(240) % 60

    def smallest(*work: Any) -> int | None:
        return smallest_square(model.spec, wse.WSE3, Workload.of(*work), EngineOptions())

    model(IDS[0])
    assert (model.wafer.rows, model.wafer.cols) == (smallest((5,), 0, None),) * 2 == (1, 1)
    assert model.wafer.spec is wse.WSE3
    small = model.wafer
    model.generate(IDS[0], 3)
    assert model.wafer is small, "what fits stays"
    model.generate(long, 3)
    assert model.wafer is not small
    assert model.wafer.rows == model.wafer.cols == smallest((240,), 3, None) > 1
    large = model.wafer
    model(IDS[0])
    assert model.wafer is large, "a grid never shrinks"
    model.record(long)
    assert model.wafer.rows >= smallest((240,), 0, None)
    for wafer in (small, large, model.wafer):
        assert_clean(wafer)


def test_max_tokens_chooses_the_grid_at_once() -> None:
    config = CONFIG | {"max_position_embeddings": 2000}
    model = wse.from_config(config, max_tokens=240)
    wafer = model.wafer
    assert wafer.rows == smallest_square(model.spec, wse.WSE3, Workload.of((240,), 0, None), EngineOptions())
    model.generate(np.arange(200) % 60, 40)
    assert model.wafer is wafer
    chunked = wse.from_config(config, max_tokens=240, prefill_chunk=8)
    assert chunked.wafer.rows < wafer.rows
    bounded = wse.from_config(CONFIG, max_tokens=1 << 40)
    assert bounded.wafer.rows == smallest_square(bounded.spec, wse.WSE3, Workload.of((64,), 0, None), EngineOptions())


def test_asked_for_early_the_grid_holds_512_tokens_or_the_models_positions() -> None:
    model = wse.from_config(CONFIG)
    wafer = model.wafer
    assert wafer.rows == smallest_square(model.spec, wse.WSE3, Workload.of((64,), 0, None), EngineOptions())
    model(IDS[0])
    assert model.wafer is wafer


def test_a_given_wafer_is_kept_and_refuses_before_anything_happens() -> None:
    needed = plan_model(make().spec, rows=3, cols=2, prompt_tokens=5, new_tokens=4, batch=2, options=EngineOptions(chunk=2)).peak_bytes
    model = make(spec=replace(wse.WSE3, sram_bytes_per_core=needed))
    model.generate(IDS, 4)
    before = len(model.wafer.ledger)
    with pytest.raises(wse.SramOverflowError, match=r"core \(\d, \d\): .* use more rows or columns") as caught:
        model.generate(np.tile(IDS, (9, 1)), 4)
    assert caught.value.core_map.used_bytes > needed
    assert len(model.wafer.ledger) == before
    assert_clean(model.wafer)
    model.generate(IDS, 4)


def test_what_fits_no_grid_is_refused_with_the_worst_core() -> None:
    spec = replace(make().spec, max_position_embeddings=1 << 24, num_layers=1 << 11)
    checkpoint = random_checkpoint(spec)
    with pytest.raises(wse.SramOverflowError, match="`keys and values of layer") as caught:
        wse.WaferModel(checkpoint, ShapeStore(spec), None, 1 << 20, 64, EngineOptions())
    assert caught.value.core_map.blocks[-1][0].endswith("(does not fit)")


# ---- refusals

BAD_IDS = [
    ([[1.0, 2.0]], r"`input_ids` must be integers \(batch, tokens\) or \(tokens,\), at least one; got float64 of shape \(1, 2\)"),
    ([[True, False]], r"`input_ids` must be integers .* got bool of shape \(1, 2\)"),
    (["a"], r"`input_ids` must be integers .* of shape \(1,\)"),
    (5, r"`input_ids` must be integers .* got int64 of shape \(\)"),
    ([], r"`input_ids` must be integers .* of shape \(0,\)"),
    (np.zeros((2, 0), np.int64), r"`input_ids` must be integers .* got int64 of shape \(2, 0\)"),
    (np.zeros((1, 1, 1), np.int64), r"`input_ids` must be integers .* got int64 of shape \(1, 1, 1\)"),
    ([[1, 2], [3]], "`input_ids` must be a rectangle of integers; pad shorter prompts on the left and give `attention_mask`"),
    ([[1, 2], [3, 60]], r"`input_ids`: sequence 1, token 1: id 60 lies outside the vocabulary 0\.\.59"),
    ([4, -1], r"`input_ids`: sequence 0, token 1: id -1 lies outside the vocabulary 0\.\.59"),
]
BAD_MASKS = [
    (MASK[:, 1:], r"`attention_mask` must hold 0 or 1 and have shape \(2, 5\), got int64 of shape \(2, 4\)"),
    (MASK[0], r"`attention_mask` must hold 0 or 1 and have shape \(2, 5\), got int64 of shape \(1, 5\)"),
    (MASK * 2, "`attention_mask` must hold 0 or 1"),
    (MASK.astype(float), r"`attention_mask` must hold 0 or 1 and have shape \(2, 5\), got float64"),
    ([[1, 1], [1]], r"`attention_mask` must be a rectangle of shape \(2, 5\)"),
    (MASK[:, ::-1], "`attention_mask`: sequence 1 must be padded on the left only and keep at least one token"),
    ([[1, 1, 0, 1, 1], [1] * 5], "`attention_mask`: sequence 0 must be padded on the left only"),
    ([[1] * 5, [0] * 5], "`attention_mask`: sequence 1 must be padded on the left only and keep at least one token"),
]


@pytest.mark.parametrize("call", ["__call__", "generate", "verify", "record"])
def test_bad_prompts_are_refused_by_name_in_every_call(model: wse.WaferModel, call: str) -> None:
    before = len(model.wafer.ledger)
    for ids, message in BAD_IDS:
        with pytest.raises(wse.InputError, match=message):
            getattr(model, call)(ids)
    for mask, message in BAD_MASKS:
        with pytest.raises(wse.InputError, match=message):
            getattr(model, call)(IDS, attention_mask=mask)
    with pytest.raises(wse.InputError, match=r"65 tokens of prompt and [01] new ones are more than the model's 64 positions"):
        getattr(model, call)(np.ones(65, np.int64), **({"max_new_tokens": 1} if call == "generate" else {}))
    assert len(model.wafer.ledger) == before


def test_positions_count_real_tokens_only(model: wse.WaferModel) -> None:
    wide, mask = np.zeros((1, 100), np.int64), (np.arange(100) >= 40).astype(int)[None]
    assert model.generate(wide, 4, attention_mask=mask).shape == (1, 104)
    with pytest.raises(wse.InputError, match="60 tokens of prompt and 5 new ones are more than the model's 64 positions"):
        model.generate(wide, 5, attention_mask=mask)


@pytest.mark.parametrize("n", [0, -1, True, 2.0, "3", None])
def test_the_number_of_new_tokens_is_a_positive_integer(model: wse.WaferModel, n: Any) -> None:
    with pytest.raises(wse.InputError, match=f"`max_new_tokens` must be an integer >= 1, got {n!r}"):
        model.generate(IDS, n)


def test_a_numpy_integer_is_a_number_of_tokens(model: wse.WaferModel) -> None:
    assert model.generate(IDS, np.int32(2)).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "`max_tokens` must be an integer >= 1 or None, got 0"),
        ({"max_tokens": 1.5}, r"`max_tokens` must be an integer >= 1 or None, got 1\.5"),
        ({"prefill_chunk": 0}, "`prefill_chunk` must be an integer >= 1 or None, got 0"),
        ({"prefill_chunk": True}, "`prefill_chunk` must be an integer >= 1 or None, got True"),
        ({"chunk": 1}, "`chunk` must be an integer >= 2 or None, got 1"),
        ({"stream_experts": "some"}, "`stream_experts` must be 'activated' or 'all', got 'some'"),
        ({"prefetch_depth": -1}, "`prefetch_depth` must be an integer >= 0, got -1"),
        ({"prefetch_depth": None}, "`prefetch_depth` must be an integer >= 0, got None"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(wse.SpecError, match=message):
        make(**options)


def test_what_is_no_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(wse.ConfigError, match=r"config: `vocab_size` must be an integer in 1\.\.2147483648, got 0"):
        wse.from_config(CONFIG | {"vocab_size": 0})
    with pytest.raises(wse.ConfigError, match=r"`seed` must be an integer in 0\.\.2\*\*128 - 1, got -1"):
        wse.from_config(CONFIG, seed=-1)
    with pytest.raises(wse.ConfigError, match="nowhere: there is no such directory"):
        wse.from_pretrained(tmp_path / "nowhere")


def test_routing_is_for_the_dry_executor_and_for_these_tokens(model: wse.WaferModel) -> None:
    out = model(IDS)
    trace = RoutingTrace.recorded(out.topk_ids)
    for call in (lambda: model(IDS, routing=trace), lambda: model.generate(IDS, 2, routing=[trace])):
        with pytest.raises(wse.InputError, match="`routing` is replayed by the `dry` executor only"):
            call()
    dry = make("dry")
    np.testing.assert_array_equal(dry(IDS, routing=trace).topk_ids, out.topk_ids)
    np.testing.assert_array_equal(dry(IDS, routing=[trace]).topk_ids, out.topk_ids)
    assert dry.generate(IDS, 1, routing=trace).shape == (2, 6)
    with pytest.raises(wse.TraceError, match="`routing` holds 1 forward passes, pass 1 was asked for"):
        dry.generate(IDS, 2, routing=trace)
    with pytest.raises(wse.TraceError, match=r"expected ids of shape \(5, 2\), got \(10, 2\)"):
        dry(IDS[0], routing=trace)
    with pytest.raises(wse.TraceError, match="holds 1 MoE layers, number 1 was asked for"):
        dry(IDS, routing=RoutingTrace(trace.topk_ids[:1]))
    assert_clean(dry.wafer)


@pytest.mark.parametrize("call", ["verify", "record"])
def test_a_dry_run_has_no_values_to_verify(call: str) -> None:
    with pytest.raises(wse.InputError, match="the `dry` executor computes no values to record; use another executor"):
        getattr(make("dry"), call)(IDS)


# ---- what stays behind


@pytest.mark.parametrize("executor", ["batched", "isolated"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_run_that_fails_anywhere_leaves_nothing_on_the_wafer(executor: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that cannot be read, at each of a layer's tensors and at the head; then the model runs as if nothing had happened."""
    model = make(executor, dense=dense)
    expected = model.generate(IDS, 2, attention_mask=MASK)
    names = ["attn_norm", "w_qkv", "w_o", "ffn_norm", *(["w_gate_up", "w_down"] if dense else ["router"])]
    if not dense:
        expert = int(model(IDS, MASK).topk_ids[1][1, -1, 0])
        names += [f"experts.{expert}.w_gate_up", f"experts.{expert}.w_down"]
    for name in [*(f"layers.1.{name}" for name in names), "final_norm", "lm_head"]:
        with monkeypatch.context() as patch:
            for method in ("vector", "tiles"):
                real = getattr(model.store, method)

                def read(asked: str, name: str = name, real: Any = real) -> Any:
                    if asked == name:
                        raise wse.StoreError(f"`{asked}` cannot be read")
                    return real(asked)

                patch.setattr(model.store, method, read)
            with pytest.raises(wse.StoreError, match=f"`{name}` cannot be read"):
                model.generate(IDS, 2, attention_mask=MASK)
        assert_clean(model.wafer)
    np.testing.assert_array_equal(model.generate(IDS, 2, attention_mask=MASK), expected)


def test_a_callback_that_raises_ends_the_run_and_leaves_nothing() -> None:
    model = make("isolated")

    def stop(step: int, _: np.ndarray) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, 5, on_token=stop)
    assert_clean(model.wafer)
    assert model.generate(IDS, 2).shape == (2, 7)


def test_a_callback_may_use_the_same_wafer() -> None:
    """The wafer is free for other work between two tokens, as far as it fits beside the cache."""
    model = make()
    inside: list[np.ndarray] = []
    outside = model(IDS).logits
    ids = model.generate(IDS, 2, on_token=lambda *_: inside.append(make_placed(model.wafer)))
    np.testing.assert_array_equal(ids, model.generate(IDS, 2))
    assert all((values == np.arange(6)).all() for values in inside)
    np.testing.assert_array_equal(model(IDS).logits, outside)


def make_placed(wafer: wse.Wafer) -> np.ndarray:
    with wafer.place(np.arange(6, dtype=np.int32)) as placed:
        return placed.gather()


def test_recorded_routing_is_that_of_the_last_call(model: wse.WaferModel) -> None:
    model.generate(IDS, 3)
    assert [trace.topk_ids[0].shape for trace in model.recorded_routing] == [(10, 2), (2, 2), (2, 2)]
    out = model(IDS, MASK)
    (trace,) = model.recorded_routing
    for ids, chosen in zip(trace.topk_ids, out.topk_ids, strict=True):
        np.testing.assert_array_equal(ids, chosen[MASK.astype(bool)])


@pytest.mark.parametrize("mapped", [False, True])
def test_a_closed_model_says_so_and_may_be_closed_again(mapped: bool, tmp_path) -> None:
    if mapped:
        write_checkpoint(random_checkpoint(CONFIG, 3), tmp_path / "checkpoint")
        wafer = wse.Wafer(rows=3, cols=2)
        model = wse.from_pretrained(tmp_path / "checkpoint", wafer=wafer, cache_dir=tmp_path / "cache")
    else:
        model = make()
    before = model(IDS)
    np.testing.assert_array_equal(before.logits, make()(IDS).logits)
    model.close()
    model.close()
    with pytest.raises(wse.StoreError, match="was asked for after the store was closed"):
        model(IDS)
    assert_clean(model.wafer)
