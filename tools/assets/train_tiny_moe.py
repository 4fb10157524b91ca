"""Train the bundled Mixture-of-Experts model of examples/tiny-moe and write it as an F16 GGUF.

The architecture is Qwen3-MoE (grouped-query attention with normalized queries and keys, rotary
positions, softmax router with renormalized top-k, SwiGLU experts), so every runtime and tool that
reads that architecture reads the result. Training is plain next-token cross entropy on English
books plus the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4) per layer.

    python -m tools.assets.train_tiny_moe books.txt.xz examples/tiny-moe/tiny-moe-f16.gguf

With the same text, seed, thread count and torch build the result is the same. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Config:
    """Shape of the model; the defaults keep the F16 file below 16 MB."""

    n_vocab: int = 4096
    n_layer: int = 4
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_expert: int = 10
    n_expert_used: int = 2
    n_ff: int = 192  # an odd multiple of 64, as 1408 and 2880 are in the wild
    n_ctx: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, n: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotate(x, cos, sin):
    """Rotary embedding of x  # [batch, head, time, head_dim], halves paired as Qwen does (NeoX order)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=False)
        self.k = nn.Linear(c.n_embd, c.n_head_kv * c.head_dim, bias=False)
        self.v = nn.Linear(c.n_embd, c.n_head_kv * c.head_dim, bias=False)
        self.o = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        heads = lambda y, n: y.view(b, t, n, self.c.head_dim)  # noqa: E731
        q = rotate(self.q_norm(heads(self.q(x), self.c.n_head)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(heads(self.k(x), self.c.n_head_kv)).transpose(1, 2), cos, sin)
        v = heads(self.v(x), self.c.n_head_kv).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Expert(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.up = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.down = nn.Linear(c.n_ff, c.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.router = nn.Linear(c.n_embd, c.n_expert, bias=False)
        self.experts = nn.ModuleList(Expert(c) for _ in range(c.n_expert))

    def forward(self, x):
        """x [batch, time, n_embd] -> (y of the same shape, load-balancing loss, tokens per expert)."""
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast("cpu", enabled=False):
            prob = F.linear(flat.float(), self.router.weight.float()).softmax(-1)  # [tokens, n_expert]
        gate, chosen = prob.topk(self.c.n_expert_used, dim=-1)
        gate = gate / gate.sum(-1, keepdim=True)
        count = torch.bincount(chosen.flatten(), minlength=self.c.n_expert)
        balance = self.c.n_expert * (prob.mean(0) * count / count.sum()).sum()
        y = torch.zeros_like(flat, dtype=torch.float32)
        order = chosen.flatten().argsort(stable=True)
        token = order // self.c.n_expert_used
        weight = gate.flatten()[order, None]
        start = 0
        for expert, n in zip(self.experts, count.tolist(), strict=True):
            if n:
                rows = token[start : start + n]
                y = y.index_add(0, rows, expert(flat[rows]).float() * weight[start : start + n])
                start += n
        return y.view_as(x), balance, count


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attn_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.attn = Attention(c)
        self.ffn_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.moe = MoE(c)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.attn_norm(x), cos, sin)
        y, balance, count = self.moe(self.ffn_norm(x))
        return x + y, balance, count


class TinyMoE(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.n_vocab, c.n_embd)  # also the output head
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                shrink = math.sqrt(2 * c.n_layer) if name.endswith(("o.weight", "down.weight")) else 1.0
                nn.init.normal_(p, std=0.02 / shrink)

    def forward(self, tokens):
        """tokens [batch, time] -> (logits, mean balance loss, tokens per layer and expert)."""
        t = tokens.shape[1]
        freq = self.c.rope_theta ** (-torch.arange(0, self.c.head_dim, 2) / self.c.head_dim)
        angle = torch.outer(torch.arange(t), freq)  # [time, head_dim / 2]
        x, balances, counts = self.embed(tokens), [], []
        for block in self.blocks:
            x, balance, count = block(x, angle.cos(), angle.sin())
            balances.append(balance)
            counts.append(count)
        return F.linear(self.norm(x), self.embed.weight), torch.stack(balances).mean(), torch.stack(counts)


def read_text(path: Path) -> str:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8", errors="replace")


def train_tokenizer(text: str, n_vocab: int):
    """Byte-level BPE with GPT-2's pre-tokenizer, which llama.cpp knows as `gpt-2`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([text[i : i + 100_000] for i in range(0, len(text), 100_000)], trainer)
    return tok


def encode(tok, text: str) -> np.ndarray:
    lines = text.splitlines(keepends=True)
    chunks = ["".join(lines[i : i + 200]) for i in range(0, len(lines), 200)]
    return np.concatenate([np.asarray(e.ids, dtype=np.uint16) for e in tok.encode_batch(chunks)])


def train(model: TinyMoE, tokens: np.ndarray, args) -> None:
    """Muon (arXiv 2502.16982) for the matrices, AdamW for embedding, router and norms."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        (matrices if p.dim() == 2 and "embed" not in name and "router" not in name else rest).append(p)
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rng = np.random.default_rng(args.seed)
    start = time.monotonic()
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 50)
        cool = min(1.0, (args.steps - step) / (0.4 * args.steps))
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = args.lr * warm * cool
        at = rng.integers(0, len(tokens) - args.seq_len - 1, size=args.batch)
        batch = torch.from_numpy(np.stack([tokens[i : i + args.seq_len + 1] for i in at]).astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, balance, count = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        (loss + args.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == args.steps - 1:
            n = (step + 1) * args.batch * args.seq_len
            share = count / count.sum(-1, keepdim=True) * model.c.n_expert
            print(
                f"step {step:5d}  loss {loss.item():.4f}  expert load {share.min():.2f}-{share.max():.2f}  "
                f"{n / 1e6:.1f} M tokens  {n / (time.monotonic() - start):.0f}/s",
                flush=True,
            )


def write_gguf(model: TinyMoE, tok, path: Path) -> None:
    """Write the model in llama.cpp's `qwen3moe` layout: matrices F16, norms and router F32."""
    import gguf

    c = model.c
    w = gguf.GGUFWriter(path, "qwen3moe")
    w.add_name("tiny-moe")
    w.add_description("A small Mixture-of-Experts language model trained on public-domain English books.")
    w.add_license("CC0-1.0")
    w.add_context_length(c.n_ctx)
    w.add_embedding_length(c.n_embd)
    w.add_block_count(c.n_layer)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_head_kv)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_feed_forward_length(c.n_ff)
    w.add_expert_feed_forward_length(c.n_ff)
    w.add_expert_count(c.n_expert)
    w.add_expert_used_count(c.n_expert_used)
    w.add_rope_freq_base(c.rope_theta)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    spec = json.loads(tok.to_str())["model"]
    ids = sorted(spec["vocab"], key=spec["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(ids)
    w.add_token_types([gguf.TokenType.CONTROL if t == END_OF_TEXT else gguf.TokenType.NORMAL for t in ids])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["merges"]])
    end = spec["vocab"][END_OF_TEXT]
    w.add_bos_token_id(end)
    w.add_eos_token_id(end)
    w.add_add_bos_token(False)
    # A base model: the template only passes the text through.
    w.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

    def put(name: str, t: torch.Tensor, dtype=np.float16):
        w.add_tensor(name, t.detach().float().numpy().astype(dtype))

    put("token_embd.weight", model.embed.weight)
    put("output_norm.weight", model.norm.weight, np.float32)
    for i, b in enumerate(model.blocks):
        put(f"blk.{i}.attn_norm.weight", b.attn_norm.weight, np.float32)
        put(f"blk.{i}.attn_q.weight", b.attn.q.weight)
        put(f"blk.{i}.attn_k.weight", b.attn.k.weight)
        put(f"blk.{i}.attn_v.weight", b.attn.v.weight)
        put(f"blk.{i}.attn_output.weight", b.attn.o.weight)
        put(f"blk.{i}.attn_q_norm.weight", b.attn.q_norm.weight, np.float32)
        put(f"blk.{i}.attn_k_norm.weight", b.attn.k_norm.weight, np.float32)
        put(f"blk.{i}.ffn_norm.weight", b.ffn_norm.weight, np.float32)
        put(f"blk.{i}.ffn_gate_inp.weight", b.moe.router.weight, np.float32)
        for part in ("gate", "up", "down"):
            stack = torch.stack([getattr(e, part).weight for e in b.moe.experts])  # [n_expert, out, in]
            put(f"blk.{i}.ffn_{part}_exps.weight", stack)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("text", type=Path, help="plain text, .txt or .xz")
    p.add_argument("output", type=Path, help="GGUF to write")
    p.add_argument("--steps", type=int, default=1800)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--seq-len", type=int, default=256)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    text = read_text(args.text)
    tok = train_tokenizer(text[:20_000_000], Config.n_vocab)
    tokens = encode(tok, text)
    model = TinyMoE(Config())
    print(f"{len(tokens) / 1e6:.1f} M tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    train(model, tokens, args)
    write_gguf(model, tok, args.output)


if __name__ == "__main__":
    main()
