"""Run llama.cpp's converter from the pinned source tree: `python hf_convert.py TREE [OPTIONS] ARGS...`.

This is a program of its own, for a process of its own: the converter brings its own gguf package, of the same name as
the one the exporter uses. It imports nothing of mobie_export. ARGS are those of convert_hf_to_gguf.py; OPTIONS before
them are

    --pre-tokenizer NAME   take this pre-tokenizer where the converter would look it up by a digest
    --header-only          leave the weights out: a file of the right size and header, with holes in place of data
    --trust-remote-code    let transformers execute Python files of the checkpoint
"""

import argparse
import json
import logging
import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# transformers 5 writes some keys under other names than the converter looks for: key -> where else it may stand.
# A key that is there already stays.
OTHER_NAMES = {
    "num_nextn_predict_layers": "num_mtp_layers",
    "n_routed_experts": "num_local_experts",
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
}
# What transformers 5 does not write at all, because its model has no choice there: architecture -> keys.
UNSAID = {
    "DeepseekV3ForCausalLM": {"scoring_func": "sigmoid"},
    "DeepseekV32ForCausalLM": {"scoring_func": "sigmoid"},
    "Dots1ForCausalLM": {"scoring_func": "sigmoid"},
    "ExaoneMoeForCausalLM": {"scoring_func": "sigmoid"},
    "Glm4MoeLiteForCausalLM": {"scoring_func": "sigmoid"},
    "MiniMaxM2ForCausalLM": {"scoring_func": "sigmoid"},
}
# What it calls by other words in lists: architecture -> key -> its word -> the converter's.
OTHER_WORDS = {
    "GraniteMoeHybridForCausalLM": {"layer_types": {"linear_attention": "mamba", "full_attention": "attention"}},
}

# The converter's class of Qwen3-VL and Qwen3-Omni: see `turn_packed`.
PACKED_TRANSPOSED = "Qwen3VLMoeTextModel"


def completed(hparams: dict) -> dict:
    """A checkpoint's configuration with what the converter looks for."""
    found = {k: hparams[o] for k, o in OTHER_NAMES.items() if k not in hparams and hparams.get(o) is not None}
    layers = hparams.get("mlp_layer_types")
    if layers and {"dense", "sparse"} >= set(layers) and layers == sorted(layers):  # all dense ones come first
        found["first_k_dense_replace"] = layers.count("dense")
    for architecture in hparams.get("architectures") or []:
        found |= UNSAID.get(architecture, {})
    found |= hparams
    for architecture in hparams.get("architectures") or []:
        for key, words in OTHER_WORDS.get(architecture, {}).items():
            if hparams.get(key):
                found[key] = [words.get(word, word) for word in hparams[key]]
    if isinstance(found.get("text_config"), dict):  # of a model for more than text
        found["text_config"] = completed(found["text_config"])
    return found


def complete(base: Any) -> None:
    """Let the converter's classes, of which `base` is the first, have completed configurations."""
    load, begin = base.load_hparams, base.__init__

    def begin_completed(self: object, *args: object, hparams: dict | None = None, **kwargs: object) -> None:
        begin(self, *args, hparams=hparams and completed(hparams), **kwargs)
        if any(c.__name__ == PACKED_TRANSPOSED for c in type(self).__mro__):
            turn_packed(self)

    base.load_hparams = staticmethod(lambda *a, **k: completed(load(*a, **k)))
    base.__init__ = begin_completed  # models with recurrent layers read config.json themselves


def turn_packed(model: Any) -> None:
    """Let a model whose packed experts the converter takes as [n_expert, inputs, outputs], as they were published, take
    them as [n_expert, outputs, inputs] too, which is how transformers 5 writes them."""
    convert, text = model.modify_tensors, model.hparams
    text = text.get("text_config") or text
    width, ff = text.get("hidden_size"), text.get("moe_intermediate_size")
    if not width or not ff:
        return
    shapes = {"gate_up_proj": ((width, 2 * ff), (2 * ff, width)), "down_proj": ((ff, width), (width, ff))}
    # from the file: what is loaded from it names the version that loads
    said = json.loads((model.dir_model / "config.json").read_bytes()).get("transformers_version")
    major = str(said).split(".")[0]
    newer = major.isdigit() and int(major) >= 5

    def modify(data: Any, name: str, layer: int | None) -> Any:
        published, written = shapes.get(name.removesuffix(".weight").rpartition(".experts.")[2], (None, None))
        if written and tuple(data.shape[1:]) == written and (published != written or newer):
            data = data.permute(0, 2, 1)
        return convert(data, name, layer)

    model.modify_tensors = modify


def write_holes(self: Any, *, progress: bool = False) -> None:
    """In place of GGUFWriter.write_tensors_to_file."""
    self.write_ti_data_to_file()
    for file, tensors in zip(self.fout, self.tensors, strict=True):
        self.write_padding(file, file.tell())
        file.truncate(file.tell() + sum(self.ggml_pad(t.nbytes, self.data_alignment) for t in tensors.values()))


def set_trust(trusted: bool) -> None:
    """Python files of a checkpoint are executed or not, whatever the converter asks for: it does so here and there."""
    import transformers
    from transformers import dynamic_module_utils

    for auto in (transformers.AutoTokenizer, transformers.AutoConfig):
        load = vars(auto)["from_pretrained"].__func__

        def from_pretrained(cls: type, *args: object, load: Callable[..., object] = load, **kwargs: object) -> object:
            return load(cls, *args, **kwargs | {"trust_remote_code": trusted})

        auto.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]

    def refuse(class_name: str, module_path: object, **_: object) -> type:
        raise ValueError(f"{class_name} of {module_path} is code of the checkpoint")

    if not trusted:
        dynamic_module_utils.get_class_in_module = refuse  # all of transformers executes by way of it


def end_with_parent() -> None:
    """Wait until the process that started this one, and holds the other end of stdin, is gone, and go."""
    while os.read(0, 1 << 10):  # not through sys.stdin, whose lock a program cannot end without
        pass
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--pre-tokenizer")
    parser.add_argument("--header-only", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    args, rest = parser.parse_known_args()
    sys.path[:1] = [str(args.tree), str(args.tree / "gguf-py")]  # in place of this file's folder
    logging.basicConfig(level=logging.ERROR)  # a line per tensor is too much; the converter sets no other level now

    set_trust(args.trust_remote_code)
    import gguf
    from conversion import ModelBase, TextModel

    if args.pre_tokenizer:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: args.pre_tokenizer
    if args.header_only:
        gguf.GGUFWriter.write_tensors_to_file = write_holes  # type: ignore[method-assign]
    complete(ModelBase)
    sys.argv = [str(args.tree / "convert_hf_to_gguf.py"), *rest]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    main()
