"""Tiny random checkpoints of Mixture-of-Experts families, as Hugging Face folders and as the GGUFs made of them.

Every one has what its family has and others lack: shared experts and their gate, dense first layers, compressed
attention, biases, attention sinks, recurrent layers, norms with an offset. Widths are odd multiples of 64.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tools.assets.fabricate_gguf import byte_tokens

N_VOCAB = 288
WIDTH, FF = 192, 320  # 3 and 5 blocks of 64
SPECIAL = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
COMMON = {
    "vocab_size": N_VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": N_VOCAB - 4,
    "eos_token_id": N_VOCAB - 4,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


MLA = {  # compressed attention, and a dense first layer
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "routed_scaling_factor": 1.5,
}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model of a family: class of transformers and its configuration."""

    architecture: str  # of the GGUF
    model: str
    config: dict
    without: tuple[str, ...] = ()  # keys of COMMON this configuration has no use for
    convert: tuple[str, ...] = ()  # options of the converter
    part: str = ""  # of a model for more than text, in the name of its configuration


FAMILIES = {
    "qwen2moe": Family(
        "qwen2moe",
        "Qwen2Moe",
        {
            "num_experts": 6,
            "moe_intermediate_size": FF,
            "shared_expert_intermediate_size": 192,
            "intermediate_size": 256,
        }
        | {"num_attention_heads": 3, "num_key_value_heads": 3},
        without=("head_dim",),
    ),
    "qwen3moe": Family(
        "qwen3moe",
        "Qwen3Moe",
        {"num_experts": 8, "moe_intermediate_size": FF, "intermediate_size": 256, "norm_topk_prob": True},
    ),
    "olmoe": Family(
        "olmoe",
        "Olmoe",
        {"num_experts": 8, "intermediate_size": FF, "num_attention_heads": 3, "num_key_value_heads": 3},
        without=("head_dim",),
    ),
    "mixtral": Family(
        "llama",
        "Mixtral",
        {"num_local_experts": 4, "intermediate_size": FF, "num_attention_heads": 6, "num_key_value_heads": 2}
        | {"head_dim": 32},
    ),
    "deepseek2": Family(
        "deepseek2",
        "DeepseekV2",
        {"n_routed_experts": 6, "moe_intermediate_size": FF, "n_shared_experts": 2, "q_lora_rank": 96} | MLA,
        without=("head_dim",),
    ),
    "deepseek2-lite": Family(  # llama.cpp knows the variant without compressed queries by its number of layers
        "deepseek2",
        "DeepseekV2",
        MLA
        | {"n_routed_experts": 6, "moe_intermediate_size": FF, "n_shared_experts": 1, "q_lora_rank": None}
        | {"num_hidden_layers": 26, "first_k_dense_replace": 25, "intermediate_size": 64}
        | {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32}
            | {"beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 64}
        },
        without=("head_dim",),
    ),
    "deepseek3": Family(
        "deepseek2",
        "DeepseekV3",
        {"n_routed_experts": 8, "moe_intermediate_size": FF, "n_shared_experts": 1, "q_lora_rank": 96}
        | MLA
        | {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "num_mtp_layers": 0},
        without=("head_dim",),
    ),
    "glm4moelite": Family(
        "deepseek2",
        "Glm4MoeLite",
        {"n_routed_experts": 6, "moe_intermediate_size": FF, "n_shared_experts": 1, "q_lora_rank": 96}
        | {k: v for k, v in MLA.items() if k != "first_k_dense_replace"}
        | {"mlp_layer_types": ["dense", "sparse"], "norm_topk_prob": True, "num_mtp_layers": 0},
        without=("head_dim",),
    ),
    "glm4moe": Family(
        "glm4moe",
        "Glm4Moe",
        {"n_routed_experts": 6, "moe_intermediate_size": FF, "n_shared_experts": 1, "intermediate_size": 256}
        | {"first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.5}
        | {"norm_topk_prob": True, "num_mtp_layers": 0, "num_nextn_predict_layers": 0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "gpt-oss": Family(
        "gpt-oss",
        "GptOss",
        {"num_local_experts": 6, "intermediate_size": 192, "sliding_window": 24}
        | {"layer_types": ["sliding_attention", "full_attention"]}
        | {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0}
            | {"beta_slow": 1.0, "truncate": True, "original_max_position_embeddings": 64}
        },
    ),
    "qwen3next": Family(
        "qwen3next",
        "Qwen3Next",
        {"num_experts": 8, "moe_intermediate_size": FF, "shared_expert_intermediate_size": 192}
        | {"intermediate_size": 256, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "norm_topk_prob": True}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "full_attention_interval": 2}
        | {"layer_types": ["linear_attention", "full_attention"]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
        convert=("--no-mtp", "--fuse-gate-up-exps"),  # gate and up in one tensor
    ),
    "qwen35moe": Family(
        "qwen35moe",
        "Qwen3_5Moe",
        {"num_experts": 6, "moe_intermediate_size": FF, "shared_expert_intermediate_size": 192}
        | {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
        | {"full_attention_interval": 2}
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
            | {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
        },
        convert=("--no-mtp",),
        part="Text",
    ),
    # without a torch twin
    "dots1": Family(
        "dots1",
        "Dots1",
        {"n_routed_experts": 6, "moe_intermediate_size": FF, "n_shared_experts": 1, "intermediate_size": 256}
        | {"first_k_dense_replace": 1, "norm_topk_prob": True, "sliding_window": None, "num_key_value_heads": 4},
    ),
    "granitemoe": Family(
        "granitemoe",
        "GraniteMoe",
        {"num_local_experts": 6, "intermediate_size": FF, "num_attention_heads": 3, "num_key_value_heads": 3}
        | {"attention_multiplier": 0.125, "residual_multiplier": 0.9, "logits_scaling": 1.5},
        without=("head_dim",),
    ),
    "granitehybrid": Family(
        "granitehybrid",
        "GraniteMoeHybrid",
        {"num_local_experts": 6, "intermediate_size": FF, "num_attention_heads": 3, "num_key_value_heads": 3}
        | {"attention_multiplier": 0.125, "residual_multiplier": 0.9, "logits_scaling": 1.5}
        | {"shared_intermediate_size": 192, "layer_types": ["linear_attention", "full_attention"]}
        | {"mamba_n_heads": 6, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 1},
        without=("head_dim",),
    ),
    "minimax-m2": Family(
        "minimax-m2",
        "MiniMaxM2",
        {"num_local_experts": 6, "intermediate_size": FF, "rotary_dim": 32}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "lfm2moe": Family(
        "lfm2moe",
        "Lfm2Moe",
        {"num_experts": 6, "moe_intermediate_size": FF, "intermediate_size": 256, "num_dense_layers": 1}
        | {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "layer_types": ["conv", "full_attention"],
            "tie_word_embeddings": True,
        },
        without=("head_dim",),
    ),
    "nemotronh": Family(
        "nemotron_h_moe",
        "NemotronH",
        {"layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4}
        | {
            "mamba_num_heads": 6,
            "mamba_head_dim": 64,
            "ssm_state_size": 16,
            "n_groups": 1,
            "n_group": 1,
            "topk_group": 1,
        }
        | {"n_routed_experts": 6, "moe_intermediate_size": FF, "moe_shared_expert_intermediate_size": 192}
        | {"moe_latent_size": None, "routed_scaling_factor": 1.5},
    ),
}


def config(family: Family, **changes) -> transformers.PretrainedConfig:
    made = {k: v for k, v in COMMON.items() if k not in family.without} | family.config | changes
    return getattr(transformers, f"{family.model}{family.part}Config")(**made)


def model(family: Family, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A random model, float32, of a size that keeps activations near one."""
    torch.manual_seed(seed)
    made = getattr(transformers, f"{family.model}ForCausalLM")(config(family, **changes)).float().eval()
    return _drawn(made, seed, inputs_first="GptOss" in family.model)


def vision_model(ff: int, seed: int = 0) -> transformers.PreTrainedModel:
    """Qwen3-VL with packed experts; ff: neurons of an expert."""
    text = {k: v for k, v in COMMON.items() if k != "pad_token_id"} | {"num_experts": 6, "moe_intermediate_size": ff}
    text |= {"intermediate_size": 256, "decoder_sparse_step": 1, "mlp_only_layers": []}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    marks = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}
    torch.manual_seed(seed)
    made = transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(
            text_config=text | {"rope_parameters": rope}, vision_config=vision, tie_word_embeddings=False, **marks
        )
    )
    return _drawn(made.float().eval(), seed)


def _drawn(made: transformers.PreTrainedModel, seed: int, inputs_first: bool = False) -> transformers.PreTrainedModel:
    """The model with weights drawn anew. inputs_first: its packed experts are [n_expert, inputs, outputs]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *((n, b) for n, b in made.named_buffers() if "correction" in n)]:
            values = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and tensor.dim() == 1:  # around one, or around zero where the layer adds the one
                tensor.add_(0.2 * values)
            elif tensor.dim() == 1 or name.endswith("_bias"):
                tensor.copy_(0.2 * values)
            else:
                fan_in = tensor.shape[-2] if inputs_first and "experts" in name else tensor[0].numel()
                fan_in = tensor.shape[-1] if tensor.dim() == 3 and not inputs_first else fan_in
                tensor.copy_(values / fan_in**0.5)
    return made


def save_tokenizer(folder: Path) -> None:
    tokens = [*byte_tokens(), "Ġt"]
    tokens += [f"<filler {i}>" for i in range(N_VOCAB - len(tokens) - len(SPECIAL))]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, [("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[0], unk_token=SPECIAL[0]
    )
    fast.save_pretrained(folder)


def save(name: str, folder: Path, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """Write a Hugging Face folder; returns the model in it."""
    made = model(FAMILIES[name], seed, **changes)
    made.save_pretrained(folder)
    save_tokenizer(folder)
    return made
