"""The emulator and the dense reference against what transformers computed in float32 (golden files, see tools/make_golden.py)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import wse_emu as wse
from wse_emu.checkpoint import Checkpoint, open_checkpoint, published_names
from wse_emu.checkpoint.families import FAMILIES
from wse_emu.foundation.model_spec import ModelSpec
from wse_emu.foundation.rope_scaling import ROPE_KINDS
from wse_emu.foundation.routing_rule import RoutingRule
from wse_emu.reference import DenseReference

from .checkpoint import test_fp8

GOLDEN = Path(__file__).resolve().parent / "golden"
CHECKPOINTS = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
CASES = ("t1", "t17", "t96", "padded")
ONE_BIG_CORE = dataclasses.replace(wse.WSE3, sram_bytes_per_core=1 << 24)
GRIDS = {"4x4": (wse.WSE3, 4, 4), "7x5": (wse.WSE3, 7, 5), "16x16": (wse.WSE3, 16, 16), "1x1": (ONE_BIG_CORE, 1, 1)}
EVERY_GRID = ("llama-yarn-options", "mistral-bfloat16", "mixtral-float32", "qwen3-float32", "qwen3_moe-mixed-float32", "qwen2_moe-bfloat16")
"""These files run on every grid by default; the others run on 4x4, and on the rest with ``-m slow``."""
RUNS = [
    pytest.param(name, grid, id=f"{name}-{grid}", marks=() if grid == "4x4" or name in EVERY_GRID else pytest.mark.slow)
    for name in CHECKPOINTS
    for grid in GRIDS
]
TOLERANCE = 1e-4
"""Largest error allowed, in standard deviations of the array compared."""
CAUGHT = 2 * TOLERANCE
"""A mistake that moves transformers' own logits by more makes a comparison fail, even one tolerance away from transformers with it."""

Golden = dict[str, NDArray[Any]]


def golden_of(name: str) -> Golden:
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def assert_close(actual: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    assert actual.shape == expected.shape, what
    error = np.abs(actual.astype(np.float64) - expected).max()
    spread = expected.std(dtype=np.float64)
    assert error <= TOLERANCE * spread, f"{what}: largest error {error:.2e}, standard deviation {spread:.2e}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def model_of(name: str, grid: str, cache: Path) -> wse.WaferModel:
    spec, rows, cols = GRIDS[grid]
    return wse.from_pretrained(GOLDEN / name, wafer=wse.Wafer(spec, rows=rows, cols=cols), cache_dir=cache)


def test_there_is_a_golden_file_for_every_family_and_dtype() -> None:
    stored = set()
    for name in CHECKPOINTS:
        with open_checkpoint(GOLDEN / name) as checkpoint:
            stored.add((checkpoint.spec.family, checkpoint.tensors.dtype(published_names(checkpoint.spec)["final_norm"].name)))
    assert stored >= {(family, "float32") for family in FAMILIES}
    assert stored >= {(family, "bfloat16") for family in ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "qwen2_moe")}
    assert "float16" in {dtype for _, dtype in stored}


def test_there_is_a_golden_file_for_every_variant() -> None:
    specs = [open_checkpoint(GOLDEN / name).spec for name in CHECKPOINTS]
    assert {spec.rope_scaling.kind for spec in specs if spec.rope_scaling is not None} == set(ROPE_KINDS)
    for spec in specs:
        if spec.rope_scaling is not None:
            assert spec.rope_scaling.original_max_position_embeddings < 96 or spec.rope_scaling.kind == "linear"
    windows = {(spec.family, len(spec.sliding_layers) == spec.num_layers) for spec in specs if spec.sliding_window is not None}
    alternating = ("qwen3", "gemma2", "gemma3_text", "dots1", "gpt_oss")
    assert windows == {("mistral", True), ("qwen3_moe", True), *((family, False) for family in alternating)}
    moe = {(spec.routing.expert_weighting_normalization, bool(spec.dense_layers)) for spec in specs if spec.family == "qwen3_moe"}
    assert moe == {(True, False), (False, False), (True, True)}


@pytest.mark.parametrize(("name", "grid"), RUNS)
def test_forward_is_that_of_transformers(name: str, grid: str, cache: Path) -> None:
    golden, model = golden_of(name), model_of(name, grid, cache)
    is_moe = "t1.router_logits" in golden
    for case in CASES:
        mask = golden[f"{case}.attention_mask"]
        real = mask.astype(bool)
        out = model(
            golden[f"{case}.input_ids"],
            attention_mask=None if real.all() else mask,
            output_hidden_states=True,
            output_router_logits=is_moe,
        )
        assert out.logits.dtype == np.float32
        assert_close(out.logits[real], golden[f"{case}.logits"][real], f"{case}: logits")
        if f"{case}.hidden" in golden:
            hidden = golden[f"{case}.hidden"]
            assert len(out.hidden_states) == len(hidden)
            for i, (actual, expected) in enumerate(zip(out.hidden_states, hidden, strict=True)):
                assert_close(actual[real], expected[real], f"{case}: hidden state {i}")
        if is_moe:
            assert len(out.router_logits) == len(golden[f"{case}.router_logits"])
            for i, expected in enumerate(golden[f"{case}.router_logits"]):
                assert_close(out.router_logits[i][real], expected[real], f"{case}: logits of router {i}")
                np.testing.assert_array_equal(out.topk_ids[i][real], golden[f"{case}.topk_ids"][i][real])
                assert_close(out.topk_weights[i][real], golden[f"{case}.topk_weights"][i][real], f"{case}: weights of router {i}")


@pytest.mark.parametrize(("name", "grid"), RUNS)
def test_greedy_tokens_are_those_of_transformers(name: str, grid: str, cache: Path) -> None:
    golden, model = golden_of(name), model_of(name, grid, cache)
    for case in CASES:
        ids, mask, expected = (golden[f"{case}.{key}"] for key in ("input_ids", "attention_mask", "generated"))
        actual = model.generate(ids, max_new_tokens=expected.shape[1] - ids.shape[1], attention_mask=None if mask.all() else mask)
        np.testing.assert_array_equal(actual, expected, err_msg=case)


FIRST = {next(name for name in CHECKPOINTS if name.startswith(family + "-")) for family in FAMILIES}
QUANTIZED = ("deepseek_v3-fp8", "gpt_oss-mxfp4")
VERIFIED = [pytest.param(name, marks=() if name in FIRST or name in QUANTIZED else pytest.mark.slow) for name in CHECKPOINTS]
"""One file of every family by default, and one of every format of weights that is not a plain one."""


@pytest.mark.parametrize("name", VERIFIED)
def test_every_stage_of_every_file_is_verified(name: str, cache: Path) -> None:
    golden, model = golden_of(name), model_of(name, "7x5", cache)
    report = model.verify(golden["t17.input_ids"])
    assert report.passed, report
    generated = golden["t17.generated"][:, :20]
    report = model.verify(generated, n_prompt=17)  # a prompt, then tokens from the cache
    assert report.passed, report


def test_every_cell_of_the_readme_is_a_test() -> None:
    """Of every family: every format that its row names is one of a golden file or of a test of FP8, and every "yes" covers all of them."""
    in_fp8 = test_fp8.test_a_model_of_another_family_in_fp8_is_the_model_of_its_numbers
    own = (test_forward_is_that_of_transformers, test_greedy_tokens_are_those_of_transformers, test_every_stage_of_every_file_is_verified)
    tests = {kind: (of_files, in_fp8) for kind, of_files in zip(("prefill", "decode", "verify"), own, strict=True)}
    stored: dict[str, dict[str, list[str]]] = {family: {} for family in FAMILIES}
    for name in CHECKPOINTS:
        with open_checkpoint(GOLDEN / name) as checkpoint:
            stored[checkpoint.spec.family].setdefault(format_of(checkpoint), []).append(name)
    for family in parameters(in_fp8):
        stored[family].setdefault("FP8", []).append(family)
    expected = []
    for family, formats in stored.items():
        names = {name for of_format in formats.values() for name in of_format}
        cells = ["yes" if names <= set().union(*map(parameters, run)) else "no" for run in tests.values()]
        expected.append([family, ", ".join(sorted(formats, key=ORDER.index)), *cells])
    text = (GOLDEN.parents[1] / "README.md").read_text(encoding="utf-8")
    head, rule, *rows = text.partition("| family | stored as |")[2].partition("\n\n")[0].splitlines()
    assert [cell.strip() for cell in head.strip("| ").split("|")] == list(tests)
    assert set(rule) == {"|", "-"}
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == expected


ORDER = ("float32", "bfloat16", "float16", "FP8", "MXFP4")


def format_of(checkpoint: Checkpoint) -> str:
    """How a checkpoint's weights are stored, in the README's words."""
    quantized = checkpoint.config.get("quantization_config", {}).get("quant_method")
    return {"fp8": "FP8", "mxfp4": "MXFP4", None: checkpoint.config["torch_dtype"]}[quantized]


def parameters(test: Any) -> set[str]:
    """First parameter of every run of a test, slow ones included."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    values = (getattr(value, "values", (value,)) for value in mark.args[1])
    return {value[0] for value in values}


def stages_of(reference: DenseReference, golden: Golden, case: str) -> dict[Any, NDArray[Any]]:
    mask = golden[f"{case}.attention_mask"]
    real = mask.astype(bool)
    return reference.forward(golden[f"{case}.input_ids"][real], np.nonzero(real)[0], (mask.cumsum(axis=1) - 1)[real])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_dense_reference_is_that_of_transformers(name: str) -> None:
    golden, checkpoint = golden_of(name), open_checkpoint(GOLDEN / name)
    spec = checkpoint.spec
    reference = DenseReference(spec, checkpoint.tensors.read)
    for case in CASES:
        real = golden[f"{case}.attention_mask"].astype(bool)
        stages = stages_of(reference, golden, case)
        assert_close(stages[None, "logits"], golden[f"{case}.logits"][real], f"{case}: logits")
        if f"{case}.hidden" in golden:
            for layer in range(spec.num_layers):
                assert_close(stages[layer, "layer_out"], golden[f"{case}.hidden"][layer + 1][real], f"{case}: output of layer {layer}")
        for i, layer in enumerate(spec.moe_layers):
            assert_close(stages[layer, "router_logits"], golden[f"{case}.router_logits"][i][real], f"{case}: router of layer {layer}")
            np.testing.assert_array_equal(stages[layer, "topk_ids"], golden[f"{case}.topk_ids"][i][real])
            assert_close(stages[layer, "topk_weights"], golden[f"{case}.topk_weights"][i][real], f"{case}: weights of layer {layer}")


# ---- the table of mistakes


def table() -> dict[str, dict[str, dict[str, str]]]:
    """MISTAKES.md: family, then mistake, then file, to the cell."""
    families: dict[str, dict[str, dict[str, str]]] = {}
    family, columns = "", []
    for line in (GOLDEN / "MISTAKES.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            family = line.removeprefix("## ")
            families[family] = {}
        elif line.startswith("| "):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            if first == "mistake":
                columns = [f"{family}-{cell}" for cell in cells]
            else:
                families[family][first] = dict(zip(columns, cells, strict=True))
    return families


def is_caught(cell: str) -> bool:
    """Whether a cell's error or one of its counts makes a test fail; recomputed, not believed."""
    error, *counts = cell.removeprefix("**missed** ").split(" / ")
    return float(error) > CAUGHT or any(int(n) for n in counts)


def fingerprint(name: str) -> str:
    files = (hashlib.sha256((GOLDEN / name / file).read_bytes()).digest() for file in ("config.json", "model.safetensors", "golden.npz"))
    return hashlib.sha256(b"".join(files)).hexdigest()[:16]


def test_mistakes_were_measured_on_these_very_files() -> None:
    fingerprints = {name: cell for rows in table().values() for name, cell in rows["*files*"].items()}
    assert fingerprints == {name: f"`{fingerprint(name)}`" for name in CHECKPOINTS}


def test_every_mistake_that_applies_is_caught_by_a_file_of_its_family() -> None:
    assert set(table()) == set(FAMILIES)
    for family, rows in table().items():
        del rows["*files*"]
        assert len(rows) > 20
        for mistake, cells in rows.items():
            measured = [cell for cell in cells.values() if cell != "not applicable"]
            assert measured, f"{family}: {mistake}"
            assert all(cell.startswith("**missed**") != is_caught(cell) for cell in measured), f"{family}: {mistake}"
            assert any(is_caught(cell) for cell in measured), f"{family}: {mistake}"


def spoilt(spec: ModelSpec, theta: float) -> Iterator[tuple[str, ModelSpec]]:
    """Rows of the table that another spec can express, with that spec; `theta` is the base that config.json gives."""
    stretch = spec.rope_theta / theta
    yield "rotary: base 10000 whatever `rope_theta` says", dataclasses.replace(spec, rope_theta=1e4 * stretch)
    if stretch != 1:
        yield "rotary: scaling ignored", dataclasses.replace(spec, rope_theta=theta)
    if spec.rope_scaling is not None:
        scales = spec.scales if spec.latent is None else dataclasses.replace(spec.scales, attention=None)  # it follows from the scaling
        yield "rotary: scaling ignored", dataclasses.replace(spec, rope_scaling=None, scales=scales)
        if spec.rope_scaling.short_mscale is not None:
            plain = dataclasses.replace(spec.rope_scaling, short_mscale=1.0, long_mscale=1.0)
            yield "rotary: `short_mscale` and `long_mscale` ignored", dataclasses.replace(spec, rope_scaling=plain)
        elif spec.rope_scaling.kind in ("yarn", "longrope"):
            plain = dataclasses.replace(spec.rope_scaling, attention_factor=1.0)
            yield "rotary: attention factor ignored", dataclasses.replace(spec, rope_scaling=plain)
    if spec.sliding_window is not None:
        alike = dataclasses.replace(spec.rotary, local_theta=None)
        yield "attention: window ignored", dataclasses.replace(spec, sliding_window=None, sliding_layers=(), rotary=alike)
        yield "attention: window one longer", dataclasses.replace(spec, sliding_window=spec.sliding_window + 1)
        yield "attention: window one shorter", dataclasses.replace(spec, sliding_window=spec.sliding_window - 1)
    if spec.chunk_size is not None:
        yield "attention: chunks ignored", dataclasses.replace(spec, chunk_size=None, chunked_layers=())
        yield "attention: chunks one longer", dataclasses.replace(spec, chunk_size=spec.chunk_size + 1)
        yield "attention: chunks one shorter", dataclasses.replace(spec, chunk_size=spec.chunk_size - 1)
    if spec.indexer is not None:
        for row, topk in (("every key taken", 1000), ("one key more", spec.indexer.topk + 1), ("one key less", spec.indexer.topk - 1)):
            yield f"indexer: {row}", dataclasses.replace(spec, indexer=dataclasses.replace(spec.indexer, topk=topk))
        otherwise = dataclasses.replace(spec.indexer, interleaved=not spec.indexer.interleaved)
        yield "indexer: halves are the pairs where neighbours are, and the reverse", dataclasses.replace(spec, indexer=otherwise)
        guarded = dataclasses.replace(spec.indexer, norm_eps=spec.rms_norm_eps)
        yield "indexer: `rms_norm_eps` as the norm's epsilon", dataclasses.replace(spec, indexer=guarded)
    if spec.query_temperature is not None:
        yield "queries' temperature: ignored", dataclasses.replace(spec, query_temperature=None)
        weaker = dataclasses.replace(spec.query_temperature, attn_scale=0.1)
        yield "queries' temperature: `attn_scale` ignored", dataclasses.replace(spec, query_temperature=weaker)
        later = dataclasses.replace(spec.query_temperature, floor_scale=spec.query_temperature.floor_scale + 1)
        yield "queries' temperature: `floor_scale` one more", dataclasses.replace(spec, query_temperature=later)
        yield "norms of queries and keys: left out", dataclasses.replace(spec, qk_norm=None)
        turned = dataclasses.replace(spec.rotary, interleaved=False)
        yield "rotary: halves are the pairs, not neighbours", dataclasses.replace(spec, rotary=turned)
        rule = dataclasses.replace(spec.routing, probability_before_ffn=False)
        yield "experts: weight on the output, not on the input", dataclasses.replace(spec, routing=rule)
    if spec.rotary.local_theta is not None:
        alike = dataclasses.replace(spec.rotary, local_theta=None)
        yield "rotary: layers with a window turn as the others", dataclasses.replace(spec, rotary=alike)
    if spec.norm.bias:
        yield "norms: biases ignored", dataclasses.replace(spec, norm=dataclasses.replace(spec.norm, bias=False))
    if spec.biases.out and spec.biases.head:
        yield "bias of the output: ignored", dataclasses.replace(spec, biases=dataclasses.replace(spec.biases, out=False))
        yield "head: bias ignored", dataclasses.replace(spec, biases=dataclasses.replace(spec.biases, head=False))
    if spec.routing.router_jitter_noise:
        for row, noise in (("`router_jitter_noise` ignored", 1e9), ("band half as wide", spec.routing.router_jitter_noise / 2)):
            rule = dataclasses.replace(spec.routing, router_jitter_noise=noise)
            yield f"experts: {row}", dataclasses.replace(spec, routing=rule)
    if spec.clip_qkv is not None:
        yield "clip: ignored", dataclasses.replace(spec, clip_qkv=None)
    if spec.family == "granitemoe":
        for field, name in (("embedding_multiplier", "embedding"), ("residual_multiplier", "residual"), ("logits_scaling", "logits")):
            yield f"scales: `{field}` ignored", dataclasses.replace(spec, scales=dataclasses.replace(spec.scales, **{name: 1.0}))
    if spec.scales.scores_cap is not None:
        free = dataclasses.replace(spec.scales, scores_cap=None)
        yield "attention: soft cap of the scores ignored", dataclasses.replace(spec, scales=free)
    if spec.scales.logits_cap is not None:
        yield "head: soft cap ignored", dataclasses.replace(spec, scales=dataclasses.replace(spec.scales, logits_cap=None))
    if spec.family.startswith("gemma"):
        plain = dataclasses.replace(spec.scales, attention=None)
        yield "scales: scores by the head's size, not by `query_pre_attn_scalar`", dataclasses.replace(spec, scales=plain)
    if spec.is_moe and spec.routing.expert_weighting_normalization:
        rule = dataclasses.replace(spec.routing, expert_weighting_normalization=False, norm_epsilon=0.0, norm_min=0.0)
        yield "experts: weights not divided by their sum", dataclasses.replace(spec, routing=rule)
    elif spec.is_moe and spec.routing.expert_weighting_nonlinearity == "softmax":
        rule = RoutingRule(n_group=spec.routing.n_group, topk_group=spec.routing.topk_group)
        yield "experts: weights divided by their sum (softmax after the choice)", dataclasses.replace(spec, routing=rule)
    if spec.is_moe:
        rules = {
            "experts: `routed_scaling_factor` ignored": {"routed_scaling_factor": 1.0},
            "experts: correction bias ignored": {"e_score_correction_bias": False},
            "experts: groups ignored": {"n_group": 1, "topk_group": 1},
            "experts: groups scored by their best expert, not by two": {"group_score": "max"} if spec.routing.n_group > 1 else {},
            "experts: groups scored by two experts, not by their best": {"group_score": "top2_sum"} if spec.routing.n_group > 1 else {},
            "experts: `moe_norm_min` ignored": {"norm_min": 0.0},
        }
        for row, changes in rules.items():
            rule = dataclasses.replace(spec.routing, **changes)
            if rule != spec.routing:
                yield row, dataclasses.replace(spec, routing=rule)
    if spec.latent is not None:
        other = dataclasses.replace(spec.latent, norm_eps=spec.rms_norm_eps)
        if spec.latent.q_lora_rank is None:
            yield "latent: `rms_norm_eps` as the norm's epsilon", dataclasses.replace(spec, latent=other)
        else:
            plain = dataclasses.replace(spec, scales=dataclasses.replace(spec.scales, attention=None))
            yield "latent: scores scaled without `mscale_all_dim`", plain
        turned = dataclasses.replace(spec.rotary, interleaved=not spec.rotary.interleaved)
        of_halves = "halves are the pairs, not neighbours" if spec.rotary.interleaved else "neighbours are the pairs, not halves"
        yield f"rotary: {of_halves}", dataclasses.replace(spec, rotary=turned)
    if spec.attn_sinks:
        yield "attention: sinks ignored", dataclasses.replace(spec, attn_sinks=False)
    if spec.clamped_experts is not None:
        for name, value in (("limit", 1e9), ("alpha", 1.0)):
            clamped = dataclasses.replace(spec.clamped_experts, **{name: value})
            yield f"experts: `swiglu_{name}` ignored", dataclasses.replace(spec, clamped_experts=clamped)
        rule = dataclasses.replace(spec.routing, router_use_bias=False)
        yield "experts: router's bias ignored", dataclasses.replace(spec, routing=rule)
    if spec.shared_experts is not None:
        yield "shared experts: left out", dataclasses.replace(spec, shared_experts=None)
    if spec.rotary.dim is not None:
        whole = dataclasses.replace(spec.rotary, dim=None)
        yield "rotary: the whole head turned", dataclasses.replace(spec, rotary=whole)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_reference_errs_as_far_as_the_table_says(name: str) -> None:
    """The table was measured in transformers; the same mistakes made in the dense reference land at the same distance from the file."""
    golden, checkpoint = golden_of(name), open_checkpoint(GOLDEN / name)
    rows = table()[checkpoint.spec.family]
    for mistake, spec in spoilt(checkpoint.spec, checkpoint.config["rope_theta"]):
        reference, error = DenseReference(spec, checkpoint.tensors.read), 0.0
        for case in CASES:
            expected = golden[f"{case}.logits"][golden[f"{case}.attention_mask"].astype(bool)]
            difference = np.abs(stages_of(reference, golden, case)[None, "logits"] - expected).max()
            error = max(error, difference / expected.std(dtype=np.float64))
        # Two digits in the table, and once the tolerance.
        assert error == pytest.approx(float(rows[mistake][name].split(" / ")[0]), rel=0.05, abs=TOLERANCE), mistake
