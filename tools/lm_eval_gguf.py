#!/usr/bin/env python3
"""lm-evaluation-harness on a GGUF in this process, without a server (docs/evaluate.md).

    pip install 'lm_eval[api]'
    python tools/lm_eval_gguf.py model-mobie.gguf --tasks arc_easy,piqa [--limit N] [--include_path DIR]

The same tasks and the same scores as over a server; much faster, because the logits do not travel as text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lm_eval
import numpy as np
from llama_cpp import Llama
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tqdm import tqdm


class GGUF(LM):
    """The harness's three questions, answered by llama.cpp."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int | None):
        super().__init__()
        self.llama = Llama(
            str(path), n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, logits_all=True, verbose=False
        )
        self.evaluated: list[int] = []  # the tokens in the cache

    def encode(self, text: str, first: bool) -> list[int]:
        """Tokens; the first ones of a text begin with the model's own beginning, if it wants one."""
        return self.llama.tokenize(text.encode(), add_bos=first, special=False) if text or first else []

    def log_probabilities(self, tokens: list[int], start: int) -> np.ndarray:
        """Of every next token after tokens[start - 1], ..., tokens[-2].  -> float64 [len(tokens) - start, n_vocab]

        What tokens has in common with the last call, below start, is not computed again.
        """
        same = next((i for i, (a, b) in enumerate(zip(tokens, self.evaluated, strict=False)) if a != b), None)
        keep = min(len(self.evaluated), len(tokens)) if same is None else same
        keep = min(keep, start - 1)
        self.llama.n_tokens = keep
        self.llama.eval(tokens[keep:-1])
        self.evaluated = tokens[:-1]
        logits = np.array(self.llama.scores[start - 1 : len(tokens) - 1], dtype=np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """(log likelihood of the continuation, whether greedy decoding would write it)"""
        tokens = (context + continuation)[-(self.llama.n_ctx()) :]
        start = max(len(tokens) - len(continuation), 1)
        logp = self.log_probabilities(tokens, start)
        wanted = np.array(tokens[start:])
        return float(logp[np.arange(len(wanted)), wanted].sum()), bool((logp.argmax(-1) == wanted).all())

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """The continuation's tokens are those that the whole text has beyond the context's, as the harness does it."""
        results = []
        for context, continuation in tqdm([r.args for r in requests], desc="likelihoods"):
            n_spaces = len(context) - len(context.rstrip())
            if n_spaces:  # a space belongs to the word that follows
                context, continuation = context[:-n_spaces], context[-n_spaces:] + continuation
            before = self.encode(context, first=True)
            whole = self.encode(context + continuation, first=True)
            before = before or whole[:1]
            results.append(self.score(before, whole[len(before) :]))
        return results

    def loglikelihood_rolling(self, requests) -> list[float]:
        results = []
        for (text,) in tqdm([r.args for r in requests], desc="texts"):
            tokens, n = self.encode(text, first=True), self.llama.n_ctx()
            pieces = [tokens[max(i - 1, 0) : i + n - 1] for i in range(0, len(tokens), n - 1)]
            results.append(sum(self.score(p[:1], p[1:])[0] for p in pieces if len(p) > 1))
        return results

    def generate_until(self, requests) -> list[str]:
        results = []
        for context, how in tqdm([r.args for r in requests], desc="texts to write"):
            stop, n = how.get("until") or [], how.get("max_gen_toks", 256)
            answer = self.llama.create_completion(context, max_tokens=n, stop=stop, temperature=0.0)
            results.append(answer["choices"][0]["text"])
            self.evaluated = []
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", required=True, help="names, with commas between them")
    parser.add_argument("--include_path", help="folder with tasks of one's own")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--limit", type=int, help="only the first so many items of each task")
    parser.add_argument("--n_ctx", type=int, default=2048)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    results = lm_eval.simple_evaluate(
        model=GGUF(args.model, args.n_ctx, args.threads),
        tasks=args.tasks.split(","),
        task_manager=TaskManager(include_path=args.include_path),
        num_fewshot=args.num_fewshot,
        limit=args.limit,
    )
    print(make_table(results))


if __name__ == "__main__":
    main()
