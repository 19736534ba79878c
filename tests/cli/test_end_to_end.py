"""The commands on the shipped model and on a small random one, nothing replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wse_emu.cli.app import invoke
from wse_emu.cli.options import shipped_model

CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mixtral on disk, without a tokenizer."""
    from safetensors.numpy import save_file

    from wse_emu.checkpoint import random_checkpoint

    made = random_checkpoint(CONFIG, seed=0)
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: made.tensors.read(name) for name in made.tensors.names()}, path / "model.safetensors")
    return path


def test_tensors_that_are_left_out_are_named_once(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save_file

    names = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(5)]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, **{name: np.zeros(3, np.float32) for name in names}}, tmp_path / "model.safetensors")
    (tmp_path / "ids.txt").write_text("1 2 3")
    words = ["verify", str(tmp_path), "--ids", str(tmp_path / "ids.txt"), "--rows", "4", "--cols", "4"]
    assert invoke(words) == 0
    err = capsys.readouterr().err
    assert err.count("inv_freq") == 4
    assert f"left out, as transformers does: {', '.join(names[:4])} and 1 more\n" in err
    code, document, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert sorted(document["ignored"]) == names


def test_zero_weights_stay_behind_when_asked_to_and_change_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    tensors[name][::2] = 0
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "ids.txt").write_text("1 2 3 4 5")
    words = [str(tmp_path), "--ids", str(tmp_path / "ids.txt"), "--rows", "3", "--cols", "3"]
    plain, skipping = (run(capsys, "run", *words, "--max-new-tokens", "2", *more)[1] for more in ((), ("--skip-zero-weights",)))
    assert skipping["generated"] == plain["generated"]
    assert skipping["verification"]["passed"]
    streamed = [sum(row["bytes"] for row in of["ledger"]["totals"] if row["kind"] == "stream") for of in (plain, skipping)]
    passes = len(plain["generated"]["ids"])
    assert streamed[0] - streamed[1] == passes * tensors[name].size // 2 * 4
    assert invoke(["verify", *words, "--skip-zero-weights"]) == 0


@pytest.fixture(autouse=True)
def _own_weights(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the commands store out of the user's cache, without compiling the kernels again."""
    from wse_emu.memoryx import build

    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr(build, "cache_directory", lambda cache_dir=None: folder / "weights")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    code = invoke([*words, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def ids_file(tmp_path: Path, n: int) -> str:
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([(7 * i + 3) % 64 for i in range(n)]))
    return str(file)


def test_shipped_model_runs_and_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["run", "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Emulated work and traffic" in out
    assert "host time" in out


def test_random_model_from_ids(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, err = run(
        capsys, "run", str(checkpoint), "--ids", ids_file(tmp_path, 9), "--max-new-tokens", "3", "--rows", "3", "--cols", "5"
    )
    assert (code, err) == (0, "")
    assert len(document["generated"]["ids"]) == 3
    assert document["generated"]["text"] is None
    assert document["verification"]["passed"] is True
    assert (document["wafer"]["rows"], document["wafer"]["cols"]) == (3, 5)
    streamed = sum(row["bytes"] for row in document["ledger"]["totals"] if row["kind"] == "stream")
    assert streamed > 0


@pytest.mark.parametrize(
    "words",
    [
        ["--rows", "1", "--cols", "5"], ["--prefill-chunk", "2"],
        pytest.param(["--executor", "isolated", "--rows", "3", "--cols", "5"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_tokens_do_not_depend_on_rows_chunks_or_executor(
    words: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "run",
        str(checkpoint),
        "--ids",
        ids_file(tmp_path, 9),
        "--max-new-tokens",
        "4",
        "--no-verify",
        "--top-k",
        "20",
        "--seed",
        "2",
    ]
    _, plain, _ = run(capsys, *common, "--rows", "3", "--cols", "5")
    code, other, _ = run(capsys, *common, *words)
    assert code == 0
    assert other["generated"] == plain["generated"]


def test_ledger_file_has_the_public_schema(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wse_emu.wafer.ledger import SCHEMA_VERSION, Event

    file = tmp_path / "ledger.json"
    code, document, _ = run(
        capsys, "run", str(checkpoint), "--ids", ids_file(tmp_path, 5), "--max-new-tokens", "2", "--no-verify", "--ledger", str(file)
    )
    written = json.loads(file.read_text())
    assert code == 0
    assert written["schema"] == SCHEMA_VERSION
    assert written["fields"] == list(Event._fields)
    macs = Event._fields.index("macs")
    assert sum(event[macs] for event in written["events"]) == sum(row["macs"] for row in document["ledger"]["totals"])


def test_verify_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(checkpoint), "--ids", ids_file(tmp_path, 12), "--rows", "2", "--cols", "3"]
    code, document, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert document["verification"]["passed"] is True
    assert (document["model"]["path"], document["wafer"]["rows"], document["wafer"]["cols"]) == (str(checkpoint), 2, 3)
    assert len(document["prompt"]["ids"]) == 12
    assert invoke(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"model     {checkpoint.name}: mixtral, ")
    assert "wafer     2 x 3 = 6 cores of WSE-3, executor batched" in out


def test_text_for_a_model_without_tokenizer_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, err = run(capsys, "run", str(checkpoint), "--prompt", "hello")
    assert (code, document) == (2, None)
    assert "use --ids FILE" in err


def test_config_json_in_the_place_of_its_directory_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, err = run(capsys, "run", str(checkpoint / "config.json"), "--ids", ids_file(tmp_path, 3))
    assert (code, document) == (4, None)
    assert f"config.json: a file; weights and tokenizer lie in its directory, {checkpoint}: give that" in err


def test_too_long_a_sequence_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, err = run(capsys, "run", str(checkpoint), "--ids", ids_file(tmp_path, 60), "--max-new-tokens", "5")
    assert (code, document) == (2, None)
    assert "60 tokens of prompt and 5 new ones are more than the model's 64 positions" in err


def test_truncated_weights_are_exit_four(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((checkpoint / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    code, document, err = run(capsys, "run", str(damaged), "--ids", ids_file(tmp_path, 3))
    assert (code, document) == (4, None)
    assert err.count("\n") == 1


def test_plan_of_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    code, document, err = run(capsys, "plan", str(config), "--prompt-tokens", "32", "--new-tokens", "4")
    assert (code, err) == (0, "")
    assert document["plan"]["fits"] is True
    assert document["plan"]["peak_bytes"] <= 49_152


def test_plan_of_a_window_says_what_keys_and_values_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    words = ("plan", str(config), "--rows", "4", "--prompt-tokens", "60", "--new-tokens", "4")
    whole, half, less = (
        run(capsys, *words, *more)[1]["plan"]["kv_bytes"]
        for more in ((), ("--window", "16", "--dense-layers", "0"), ("--window", "12", "--sinks", "4"))
    )
    assert half == whole // 64 * (64 + 16 * (CONFIG["num_hidden_layers"] - 1)) // CONFIG["num_hidden_layers"]
    assert less == whole // 4
    assert run(capsys, *words, "--sinks", "4")[0] == run(capsys, *words, "--window", "4", "--dense-layers", "first")[0] == 2
    assert run(capsys, *words, "--window", "4", "--dense-layers", "9")[0] == 2


def test_plan_of_a_small_model_takes_as_long_a_prompt_as_it_has_positions_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    code, document, err = run(capsys, "plan", str(config))
    assert (code, err) == (0, "")
    assert (document["prompt_tokens"], document["new_tokens"]) == (32, 32)
    assert document["model"]["n_params"] > 0


def test_plan_says_what_a_grid_holds_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(rows: int, prompt_tokens: int) -> Any:
        words = ["--rows", str(rows), "--prompt-tokens", str(prompt_tokens), "--new-tokens", "1"]
        return run(capsys, "plan", str(shipped_model()), *words)[1]["plan"]

    refused = plan(2, 300)
    assert refused["fits"] is False
    assert 1 < refused["max_context"] < 301
    assert plan(2, refused["max_context"] - 1)["fits"] is True
    side = int(refused["message"].rpartition("the smallest square that holds it is ")[2].split(" x ")[0])
    assert (plan(side, 300)["fits"], plan(side - 1, 300)["fits"]) == (True, False)


def test_plan_of_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = run(
        capsys, "plan", str(shipped_model()), "--rows", "1", "--cols", "1", "--prompt-tokens", "500", "--new-tokens", "1"
    )
    assert code == 3
    assert document["plan"]["fits"] is False
    assert document["plan"]["message"]


def test_plan_for_people_names_the_worst_core(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["plan", str(shipped_model()), "--prompt-tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert "SRAM of the worst core" in out
    assert "weights streamed for the prompt" in out
    # 4 layers, 96 tokens, 4 heads of 16: keys and values of 4 bytes
    assert "\nkeys and values at the end: 196,608 bytes (196.6080 kB, 192.0 KiB)\n" in out
    assert invoke(["plan", str(shipped_model()), "--prompt-tokens", "64", "--window", "9", "--sparse-layers", "0-2"]) == 0
    assert "\nattention window 9: layers 0-2\nattention all keys: layers 3\n" in capsys.readouterr().out


def test_run_on_too_small_a_grid_is_exit_three(capsys: pytest.CaptureFixture[str]) -> None:
    code, document, err = run(capsys, "run", "--prompt", "a " * 200, "--rows", "1", "--cols", "1")
    assert (code, document) == (3, None)
    assert err.count("\n") == 1


def test_a_run_in_16_bits_verifies_and_says_so(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.txt").write_text("1 2 3 4 5")
    words = [str(checkpoint), "--ids", str(tmp_path / "ids.txt"), "--rows", "3", "--cols", "3", "--dtype", "bfloat16"]
    code, document, err = run(capsys, "run", *words, "--kv-dtype", "cb16", "--max-new-tokens", "3")
    assert code == 0, err
    assert document["precision"] == {"dtype": "bfloat16", "kv_dtype": "cb16", "precision_opt_level": 0}
    assert document["verification"]["passed"]
    assert invoke(["verify", *words]) == 0
    out = capsys.readouterr().out
    assert "executor batched, stored in bfloat16\n" in out
    assert "stored in bfloat16; bounds follow that" in out
    plans = [run(capsys, "plan", str(checkpoint), "--prompt-tokens", "8", "--rows", "3", *more)[1] for more in ((), ("--dtype", "float16"))]
    assert plans[0]["plan"]["kv_bytes"] == 2 * plans[1]["plan"]["kv_bytes"]
    assert (plans[1]["dtype"], plans[1]["kv_dtype"], plans[1]["precision_opt_level"]) == ("float16", "float16", 0)


def test_a_level_of_sums_is_passed_on_and_refused_with_float32(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text("1 2 3 4 5")
    level = ["--precision-opt-level", "1"]
    words = [str(checkpoint), "--ids", str(tmp_path / "ids.txt"), "--rows", "3", "--cols", "3"]
    code, document, err = run(capsys, "run", *words, *level, "--dtype", "bfloat16", "--max-new-tokens", "2")
    assert code == 0, err
    assert document["precision"]["precision_opt_level"] == 1
    assert document["verification"]["passed"]
    assert invoke(["verify", *words, *level, "--dtype", "cb16"]) == 0
    assert "executor batched, stored in cb16, precision_opt_level 1\n" in capsys.readouterr().out
    code, document, err = run(capsys, "plan", str(checkpoint), "--prompt-tokens", "8", *level, "--dtype", "cb16")
    assert (code, document["precision_opt_level"]) == (0, 1)
    code, document, err = run(capsys, "sparsify", *words, *level, "--dtype", "cb16")
    assert code == 0, err
    for command in ("run", "verify", "sparsify"):
        code, document, err = run(capsys, command, *words, *level)
        assert (code, document) == (2, None)
        assert "`precision_opt_level` 1 hands sums on in the 16 bits of `dtype`, which is float32" in err


def test_growth_behind_the_last_token_generates_the_same_and_moves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(checkpoint), "--ids", ids_file(tmp_path, 5), "--rows", "3", "--cols", "2", "--max-new-tokens", "4"]
    found = {growth: run(capsys, "run", *words, "--kv-growth", growth)[1] for growth in ("shift", "concat")}
    assert found["shift"]["generated"] == found["concat"]["generated"]
    assert found["concat"]["verification"]["passed"]
    shifted = {growth: sum(row["wavelets"] for row in of["ledger"]["totals"] if row["kind"] == "shift") for growth, of in found.items()}
    assert shifted["shift"] > shifted["concat"] == 0
    asked = run(capsys, "plan", str(checkpoint), "--prompt-tokens", "8", "--rows", "3", "--kv-growth", "concat")[1]
    assert asked["kv_growth"] == "concat"
    assert run(capsys, "run", *words, "--kv-growth", "append")[0] == 2


def test_inputs_in_place_of_keys_and_values_generate_the_same(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(checkpoint), "--ids", ids_file(tmp_path, 5), "--rows", "3", "--cols", "2", "--max-new-tokens", "3"]
    found = {kv: run(capsys, "run", *words, "--kv", kv)[1] for kv in ("store", "recompute")}
    assert found["store"]["generated"] == found["recompute"]["generated"]
    assert found["recompute"]["verification"]["passed"]
    stages = {kv: {row["stage"] for row in of["ledger"]["totals"]} for kv, of in found.items()}
    assert stages["recompute"] - stages["store"] == {"recompute"}
    asked = run(capsys, "plan", str(checkpoint), "--prompt-tokens", "8", "--rows", "3", "--kv", "recompute")[1]
    assert asked["kv"] == "recompute"


def test_another_routing_rule_is_run_verified_and_planned(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(checkpoint), "--ids", ids_file(tmp_path, 3), "--rows", "3", "--cols", "3")
    ways = ("--tie-policy", "highest_id", "--moe-implementation", "optimized", "--bta-max-tile", "1")
    code, document, err = run(capsys, "run", *words, *ways, "--max-new-tokens", "2")
    assert (code, err) == (0, "")
    assert document["model"]["spec"]["routing"]["tie_policy"] == "highest_id"
    assert any(row["kind"] == "launch" for row in document["ledger"]["totals"])
    options = {"num_experts": 4, "routing_algorithm": "hash", "moe_implementation": "functional"}
    code, document, err = run(capsys, "verify", *words, "--routing", json.dumps(options))
    assert (code, err, document["model"]["spec"]["top_k"]) == (0, "", 1)
    assert document["model"]["spec"]["routing"]["routing_algorithm"] == "hash"
    assert invoke(["plan", str(checkpoint), "--rows", "3", "--routing", "switch"]) == 0
    assert "\nrouting capacity_factor 1.25, expert_weighting_normalization False\n" in capsys.readouterr().out
    assert invoke(["verify", *words, "--tie-policy", "highest_id"]) == 0
    assert "\nrouting   tie_policy highest_id\n" in capsys.readouterr().out
    plans = [
        run(capsys, "plan", str(checkpoint), "--rows", "2", "--cols", "4", "--prompt-tokens", "20", "--batch", "4", *more)[1]
        for more in ((), ("--bta-max-tile", "1"), ("--routing", '{"capacity_factor": 1.5}'), ("--moe-implementation", "functional"))
    ]
    assert [plan["moe_implementation"] for plan in plans] == ["experimental"] * 3 + ["functional"]
    assert [plan["bta_max_tile"] for plan in plans] == [None, 1, None, None]
    assert plans[2]["model"]["spec"]["routing"]["capacity_factor"] == 1.5
    peaks = [plan["plan"]["peak_bytes"] for plan in plans]
    assert peaks[1] < peaks[0] < peaks[3]
    streamed = [plan["plan"]["stream_bytes_token"] for plan in plans]
    attention = 2 * (2 * 32 * (32 + 16)) * 4  # two layers of queries, keys, values and output
    assert streamed[1] - streamed[0] >= 3 * attention  # once for each of four tiles


def test_a_tie_that_is_refused_is_bad_input(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    save_file({name: w * (not name.endswith("gate.weight")) for name, w in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code, document, err = run(capsys, "verify", str(tmp_path), "--ids", ids_file(tmp_path, 3), "--tie-policy", "reject")
    assert (code, document) == (2, None)
    assert "layer 0, sequence 0" in err
    assert "wse-emu itself" not in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ('{"num_expert": 4}', "--routing: RoutingRule has no 'num_expert'"),
        ('{"num_experts": 4, "n_group": 2}', "--routing: MoEConfig has no 'n_group'"),
        ("{", "--routing: not valid JSON"),
        ("nope", "`routing` must be one of mixtral"),
        ('{"e_score_correction_bias": true}', "needs a correction bias, which this checkpoint's routers have not"),
        ('{"n_group": 3}', "`n_group` must divide the experts"),
    ],
)
def test_a_rule_that_is_none_or_does_not_fit_is_bad_usage(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    for command in (["verify", "--ids", ids_file(tmp_path, 3)], ["plan"]):
        code, document, err = run(capsys, command[0], str(checkpoint), *command[1:], "--routing", option)
        assert (code, document) == (2, None)
        assert message in err
