"""What the installed llama.cpp computes, and how far two models are from each other."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

CONTEXT = 512
N_TOKENS = 24


@dataclass
class Divergence:
    """From the truth's next-token distributions, over all positions."""

    kl: float  # mean Kullback-Leibler divergence, nats
    top1: float  # share of positions whose most likely token differs


def load(path: Path):
    from llama_cpp import Llama

    return Llama(
        str(path),
        n_ctx=CONTEXT,
        n_batch=CONTEXT,
        n_threads=2,
        n_threads_batch=2,
        flash_attn=False,
        logits_all=True,
        verbose=False,
    )


def log_probabilities(path: Path, chunks: np.ndarray, one_by_one: bool) -> np.ndarray:
    """chunks int [n_chunks, CONTEXT] -> float64 [n_chunks * CONTEXT, n_vocab]"""
    return scored(load(path), chunks, one_by_one)


def scored(llama, chunks: np.ndarray, one_by_one: bool) -> np.ndarray:
    """chunks int [n_chunks, length] -> float64 [n_chunks * length, n_vocab], log probabilities; closes the model"""
    result = []
    for chunk in chunks.tolist():
        llama.reset()
        for piece in [[t] for t in chunk] if one_by_one else [chunk]:
            llama.eval(piece)
        logits = np.asarray(llama.scores[: len(chunk)], dtype=np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        result.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    llama.close()
    return np.concatenate(result)


def divergence(truth: np.ndarray, other: np.ndarray) -> Divergence:
    assert np.isfinite(truth).all() and np.isfinite(other).all()
    kl = (np.exp(truth) * (truth - other)).sum(axis=-1)
    return Divergence(float(kl.mean()), float((truth.argmax(-1) != other.argmax(-1)).mean()))


def logits(path: Path, n_batch: int, lora: Path | None = None) -> np.ndarray:
    """Of tokens 3, 4, ...: float64 [N_TOKENS, n_vocab]."""
    from llama_cpp import Llama

    options = {"n_ctx": 64, "n_batch": n_batch, "n_threads": 1, "flash_attn": False, "logits_all": True}
    llama = Llama(str(path), lora_path=lora and str(lora), verbose=False, **options)
    llama.eval(list(range(3, 3 + N_TOKENS)))
    found = np.array(llama.scores[:N_TOKENS], np.float64)
    llama.close()
    return found
