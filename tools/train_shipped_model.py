"""Make the small trained model that ships with the package: ``wse_emu/data/pydoc-moe-8x2``.

A mixture of experts in Mixtral's form (8 experts, top-2, 2.6 million parameters, 5.3 MB as bfloat16), trained on text that comes with
every CPython: the reference topics of `pydoc_data.topics` and the docstrings of the standard library, both under the PSF licence. Nothing
is downloaded.

    python tools/train_shipped_model.py                    # train, export, measure: about half an hour on one core
    python tools/train_shipped_model.py --measure-only     # measure again what lies in the output directory

Needs torch, tokenizers, safetensors, and transformers for the measurement. With the same CPython, torch, thread count and kind of
processor the run is reproducible.

Held out are the last 5 % (by name) of the topics and of the modules; a paragraph that occurs there is removed from the training text.
Prose is unwrapped, so that the model need not learn where lines of 70 characters break.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

OUT = Path(__file__).resolve().parents[1] / "wse_emu" / "data" / "pydoc-moe-8x2"
END = "<|endoftext|>"
HELD_OUT_FRACTION = 0.05
PROMPT = "If the argument"
NEW_TOKENS = 32
SKIPPED = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "__pycache__"})
"""Parts of the standard library's directory that hold no documentation of the language, or other people's packages."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of the model; names are those of Mixtral's ``config.json``."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 176
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 16
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    router_aux_loss_coef: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the model is trained."""

    steps: int = 3600
    tokens_per_step: int = 2048
    sequence: int = 256
    long_sequence: int = 512
    """Length used in the last part of the run, so that the model has seen its whole context."""
    long_fraction: float = 0.15
    learning_rate: float = 3e-3
    final_fraction: float = 0.03
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    dropout: float = 0.05
    seed: int = 20260


# ---------------------------------------------------------------------------------------------------------------- text


BULLET = re.compile(r"([*+-]|\d+\.|\([a-z0-9]\)) ")
NOT_PROSE = re.compile(r"\s|>>>|\.\.\.|[^\w\s]{2}[^\w]|[|#+=~-]")
"""How a line begins that must stay on its own: indented, an example, a rule or a table."""


def unwrap(text: str) -> str:
    """Join the wrapped lines of prose paragraphs and list items; indented blocks, examples and tables keep their lines."""
    out = []
    for block in re.split(r"\n{2,}", text.expandtabs().strip("\n")):
        joined: list[str] = []
        wrapped = False  # whether the last line was long enough to have been wrapped
        for line in block.rstrip().split("\n"):
            item = bool(joined) and bool(BULLET.match(joined[-1])) and line.startswith("  ") and line[2:3].strip() != ""
            starts = BULLET.match(line) or (NOT_PROSE.match(line) and not item)
            if wrapped and not starts and (item or not joined[-1][:1].isspace()):
                joined[-1] += " " + line.strip()
            else:
                joined.append(line.rstrip())
            wrapped = len(line.rstrip()) > 50 and "   " not in line.strip() and not line.startswith(">>>")
        out.append(_unwrap_indented(joined))
    return "\n\n".join(out)


def _unwrap_indented(lines: list[str]) -> str:
    """Join an indented block if it reads as one wrapped paragraph."""
    indents = {len(line) - len(line.lstrip()) for line in lines}
    first, text = lines[0].strip(), "\n".join(lines)
    wrapped = all(len(line) > 45 for line in lines[:-1]) and not any(s in text for s in ("::=", ">>>", " = ", "|"))
    if len(indents) == 1 and indents != {0} and wrapped and first[:1].isalpha() and text.rstrip()[-1:] in ".:)":
        return lines[0] + "".join(" " + line.strip() for line in lines[1:])
    return text


def module_documents() -> Iterator[tuple[str, str]]:
    """Yield (module, signatures and docstrings) for the modules of the installed standard library, by name."""
    lib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(lib.rglob("*.py")):
        relative = path.relative_to(lib)
        if SKIPPED & set(relative.parts):
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        parts = []
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            doc = ast.get_docstring(node)
            if not doc:
                continue
            if isinstance(node, ast.Module):
                head = f"module {name}"
            elif isinstance(node, ast.ClassDef):
                head = f"class {node.name}({', '.join(map(ast.unparse, node.bases))})" if node.bases else f"class {node.name}"
            else:
                head = f"{node.name}({ast.unparse(node.args)})"
            parts.append(f"{head}\n\n{unwrap(inspect.cleandoc(doc))}")
        if parts:
            yield name, "\n\n".join(parts)


def documents() -> tuple[list[str], list[str]]:
    """Training and held-out documents; no paragraph of the second occurs in the first, and none occurs twice in the first."""
    train: list[str] = []
    held: list[str] = []
    for kind in ([(k, unwrap(topics[k])) for k in sorted(topics)], list(module_documents())):
        n_held = max(1, round(HELD_OUT_FRACTION * len(kind)))
        train += [text for _, text in kind[:-n_held]]
        held += [text for _, text in kind[-n_held:]]
    seen = {p.strip() for text in held for p in text.split("\n\n")}
    kept = []
    for text in train:
        paragraphs = []
        for p in text.split("\n\n"):
            if p.strip() not in seen:
                paragraphs.append(p)
                if len(p) > 40:
                    seen.add(p.strip())
        if paragraphs:
            kept.append("\n\n".join(paragraphs))
    return kept, held


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All documents as one stream of token ids, (n,), int64; every document is preceded by the end token."""
    ids: list[int] = []
    for text in texts:
        ids.append(0)
        ids.extend(tokenizer.encode(text).ids)
    return torch.tensor(ids, dtype=torch.int64)


# --------------------------------------------------------------------------------------------------------------- model


class RmsNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Shape is kept."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (half-split pairs)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden_size, s.num_attention_heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.num_attention_heads * s.head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x``: (batch, tokens, hidden); ``cos``, ``sin``: (tokens, head_dim)."""
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, -1, self.s.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, -1, self.s.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, -1, self.s.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        repeat = self.s.num_attention_heads // self.s.num_key_value_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Experts(nn.Module):
    """Top-k routing over SwiGLU experts; the chosen probabilities are divided by their sum."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.gate = nn.Linear(s.hidden_size, s.num_local_experts, bias=False)
        self.w13 = nn.Parameter(torch.empty(s.num_local_experts, 2 * s.intermediate_size, s.hidden_size))
        self.w2 = nn.Parameter(torch.empty(s.num_local_experts, s.hidden_size, s.intermediate_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x``: (tokens, hidden). Returns the mixture, (tokens, hidden), and the balancing loss of this layer, ()."""
        n_experts, k = self.s.num_local_experts, self.s.num_experts_per_tok
        probabilities = self.gate(x).float().softmax(-1)
        weights, ids = probabilities.topk(k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=n_experts)
        token = order // k
        outs = []
        for rows, w13, w2 in zip(x[token].split(counts.tolist()), self.w13.unbind(), self.w2.unbind(), strict=True):
            gate, up = (rows @ w13.T).chunk(2, -1)
            outs.append((F.silu(gate) * up) @ w2.T)
        y = torch.cat(outs) * weights.flatten()[order].unsqueeze(-1)
        balance = n_experts * (counts / x.shape[0] * probabilities.mean(0)).sum()
        return torch.zeros_like(x).index_add(0, token, y.to(x.dtype)), balance


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RmsNorm(s.hidden_size, s.rms_norm_eps)
        self.block_sparse_moe = Experts(s)
        self.dropout = dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """``x``: (batch, tokens, hidden). Returns the layer's output and its balancing loss."""
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        y, balance = self.block_sparse_moe(self.post_attention_layernorm(x).flatten(0, 1))
        return x + F.dropout(y.view_as(x), self.dropout, self.training), balance


class Model(nn.Module):
    """Decoder-only transformer whose logits use the embedding's weights."""

    def __init__(self, s: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s, dropout) for _ in range(s.num_hidden_layers))
        self.norm = RmsNorm(s.hidden_size, s.rms_norm_eps)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                continue
            std = 0.05 if "embed" in name else p.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "w2")):
                std /= math.sqrt(2 * s.num_hidden_layers)
            nn.init.normal_(p, std=std)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``ids``: (batch, tokens). Returns the logits, (batch, tokens, vocab), and the mean balancing loss."""
        angle = torch.arange(ids.shape[1], dtype=torch.float64)[:, None] * self.s.rope_theta ** (
            -torch.arange(0, self.s.head_dim, 2, dtype=torch.float64) / self.s.head_dim
        )
        cos, sin = (torch.cat((f(angle),) * 2, -1).float() for f in (torch.cos, torch.sin))
        x = self.embed_tokens(ids)
        balances = []
        for layer in self.layers:
            x, balance = layer(x, cos, sin)
            balances.append(balance)
        return F.linear(self.norm(x), self.embed_tokens.weight), torch.stack(balances).mean()


# ------------------------------------------------------------------------------------------------------------ training


def train(model: Model, stream: Tensor, held: Tensor, recipe: Recipe, out: Path, *, export_every: int) -> None:
    """Train in place; every `export_every` steps the model so far is written to `out`."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    windows: list[int] = []
    rng = torch.Generator().manual_seed(recipe.seed)
    started, mean = time.time(), 0.0
    for step in range(recipe.steps):
        long = step >= recipe.steps * (1 - recipe.long_fraction)
        length = recipe.long_sequence if long else recipe.sequence
        if step == math.ceil(recipe.steps * (1 - recipe.long_fraction)):
            windows = []
        batch = []
        while len(batch) < recipe.tokens_per_step // length:
            if not windows:  # one epoch: all windows from a random offset, in random order
                offset = int(torch.randint(length, (), generator=rng))
                starts = torch.arange(offset, len(stream) - length - 1, length)
                windows = starts[torch.randperm(len(starts), generator=rng)].tolist()
            start = windows.pop()
            batch.append(stream[start : start + length + 1])
        ids = torch.stack(batch)
        rate = min(1.0, (step + 1) / recipe.warmup_steps)
        progress = max(0.0, (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps))
        rate *= recipe.final_fraction + (1 - recipe.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        logits, balance = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + model.s.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {mean:.3f}, balance {balance.item() / 2:.3f}, {time.time() - started:.0f} s", flush=True)
        if (step + 1) % export_every == 0 or step + 1 == recipe.steps:
            export(model, out)
            print(f"step {step + 1}: held-out loss {held_out_loss(model, held, recipe.sequence):.3f}", flush=True)


@torch.no_grad()
def held_out_loss(model: Model, held: Tensor, length: int) -> float:
    """Mean loss in nats per token over all held-out windows."""
    model.eval()
    n = (len(held) - 1) // length
    ids, targets = held[: n * length].view(n, length), held[1 : n * length + 1].view(n, length)
    total = sum(
        F.cross_entropy(model(ids[i : i + 8])[0].flatten(0, 1), targets[i : i + 8].flatten(), reduction="sum").item()
        for i in range(0, n, 8)
    )
    model.train()
    return total / (n * length)


def export(model: Model, out: Path) -> None:
    """Write config.json and model.safetensors (bfloat16, names as in released Mixtral checkpoints)."""
    s = model.s
    tensors: dict[str, Tensor] = {}
    for name, p in model.state_dict().items():
        if name.endswith(".w13"):
            for e in range(s.num_local_experts):
                tensors[f"model.{name[:-3]}experts.{e}.w1.weight"] = p[e, : s.intermediate_size]
                tensors[f"model.{name[:-3]}experts.{e}.w3.weight"] = p[e, s.intermediate_size :]
        elif name.endswith(".w2"):
            for e in range(s.num_local_experts):
                tensors[f"model.{name[:-2]}experts.{e}.w2.weight"] = p[e]
        else:
            tensors[f"model.{name}"] = p
    rounded = {name: p.to(torch.bfloat16).contiguous() for name, p in tensors.items()}
    partial = out / "model.safetensors.partial"
    save_file(rounded, partial, metadata={"format": "pt"})
    partial.replace(out / "model.safetensors")
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **asdict(s),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "output_router_logits": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- measurement


@torch.no_grad()
def measure(out: Path, *, n_windows: int = 8, length: int = 256) -> dict[str, Any]:
    """Measure what was written, with transformers in float32: held-out loss, loss with permuted routers, load of every expert.

    Windows are spread evenly over the held-out text; the loss is the mean over tokens 1.. of every window.
    """
    from transformers import MixtralForCausalLM

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    held = encode(tokenizer, documents()[1])
    starts = [i * (len(held) - length) // (n_windows - 1) for i in range(n_windows)]
    ids = torch.stack([held[i : i + length] for i in starts])
    model, info = MixtralForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    if any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise SystemExit(f"transformers does not load the checkpoint completely: {info}")
    model.eval()

    def losses() -> list[float]:
        logits = model(ids).logits
        each = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return [round(x, 6) for x in each.view(n_windows, -1).mean(1).tolist()]

    plain = losses()
    mine = Model(Shape(**{k: v for k, v in json.loads((out / "config.json").read_text()).items() if k in Shape.__annotations__})).eval()
    _load(mine, load_file(out / "model.safetensors"))
    theirs = model(ids, output_router_logits=True)
    gaps = torch.cat([r.topk(3, -1).values.diff(dim=-1).abs().flatten() for r in theirs.router_logits])
    prompt = torch.tensor([tokenizer.encode(PROMPT).ids])
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    leads = model(written).logits[0, prompt.shape[1] - 1 : -1].topk(2, -1).values.diff(dim=-1).abs()
    spread = theirs.logits.std().item()
    difference = (mine(ids)[0] - theirs.logits).abs().max().item() / spread
    if difference > 1e-4:
        raise SystemExit(f"the trained model and transformers differ by {difference:.2e} of the logits' standard deviation")
    load = [(torch.bincount(r.topk(2, -1).indices.flatten(), minlength=8) / (2 * r.shape[0])).tolist() for r in theirs.router_logits]

    permutation = [*range(1, mine.s.num_local_experts), 0]
    for name, p in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")):
            p.copy_(p[permutation])
    permuted = losses()
    result = {
        "ids": ids.tolist(),
        "loss_per_window": plain,
        "loss": round(sum(plain) / n_windows, 6),
        "router_permutation": permutation,
        "loss_per_window_permuted_router": permuted,
        "loss_permuted_router": round(sum(permuted) / n_windows, 6),
        "unit": "nats per token, mean over tokens 1.. of each window",
        "measured_with": f"transformers float32, torch {torch.__version__.split('+')[0]}, CPython {platform.python_version()}",
        "logits_std": round(spread, 6),
        "smallest_router_gap": round(gaps.min().item(), 9),
        "greedy": {
            "prompt": PROMPT,
            "prompt_ids": prompt[0].tolist(),
            "ids": written[0].tolist(),
            "text": tokenizer.decode(written[0].tolist()),
            "smallest_lead": round(leads.min().item(), 6),
        },
        "expert_load": [[round(x, 4) for x in layer] for layer in load],
    }
    print(f"held-out loss {result['loss']}, permuted routers {result['loss_permuted_router']}, own code differs by {difference:.1e} std")
    print(f"greedy: {result['greedy']['text']!r}")
    for layer, row in enumerate(load):
        print(f"layer {layer}: load of the experts {min(row):.3f} to {max(row):.3f} (even: 0.125)")
    return result


def _load(model: Model, tensors: dict[str, Tensor]) -> None:
    """Fill `model` from a file that `export` wrote."""
    state: dict[str, Tensor] = {}
    experts = range(model.s.num_local_experts)
    for name in model.state_dict():
        base = f"model.{name.rpartition('.')[0]}.experts."
        if name.endswith(".w13"):
            state[name] = torch.stack([torch.cat([tensors[f"{base}{e}.w{i}.weight"] for i in (1, 3)]) for e in experts]).float()
        elif name.endswith(".w2"):
            state[name] = torch.stack([tensors[f"{base}{e}.w2.weight"] for e in experts]).float()
        else:
            state[name] = tensors[f"model.{name}"].float()
    model.load_state_dict(state)


def write_tokenizer(tokenizer: Tokenizer, out: Path, context: int) -> None:
    """Write tokenizer.json (compact) and tokenizer_config.json."""
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Train, export and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export-every", type=int, default=200)
    parser.add_argument("--measure-only", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.measure_only:
        recipe, shape = Recipe(steps=args.steps), Shape()
        torch.manual_seed(recipe.seed)
        train_texts, held_texts = documents()
        tokenizer = train_tokenizer(train_texts, shape.vocab_size)
        write_tokenizer(tokenizer, args.out, shape.max_position_embeddings)
        stream, held = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
        n_chars = sum(map(len, train_texts))
        model = Model(shape, recipe.dropout)
        print(f"{n_chars} characters, {len(stream)} tokens to train on, {len(held)} held out", file=sys.stderr)
        print(f"{sum(p.numel() for p in model.parameters())} parameters", file=sys.stderr)
        train(model, stream, held, recipe, args.out, export_every=args.export_every)
    result = measure(args.out)
    (args.out / "heldout.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
