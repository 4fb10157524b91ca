"""Print a digest of all logits of a model over a fixed token sequence: same digest, same bits.

Which build of the libraries is used is said by LLAMA_CPP_LIB_PATH. One thread, no flash attention.
"""

import hashlib
import sys

import numpy as np
from llama_cpp import Llama

N_TOKENS = 256


def digest(model: str) -> str:
    llama = Llama(model, n_ctx=N_TOKENS, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    llama.eval(np.random.default_rng(0).integers(0, llama.n_vocab(), N_TOKENS).tolist())
    return hashlib.sha256(np.ascontiguousarray(llama.scores[:N_TOKENS]).tobytes()).hexdigest()


if __name__ == "__main__":
    print(digest(sys.argv[1]))
