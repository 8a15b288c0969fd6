"""The families of models that are tried, each in the size of a toy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers as T

IMAGE_SIZE = 32
TASKS = {
    "encoder": ("classify",),
    "decoder": ("classify", "causal-lm", "instruct"),
    "both": ("classify", "causal-lm", "instruct"),
    "image": ("image-classify",),
}
SAVED = {
    "encoder": T.AutoModel,
    "decoder": T.AutoModelForCausalLM,
    "both": T.AutoModelForSeq2SeqLM,
    "image": T.AutoModel,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = WIDTH | STILL | {"max_position_embeddings": 40}
DECODER = WIDTH | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 64, "initializer_range": 0.2}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
BART |= {
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "forced_eos_token_id": None,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
VIT = WIDTH | STILL | {"image_size": IMAGE_SIZE, "patch_size": 8}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
VISION = {
    "vision_config": VIT | {"projection_dim": 32},
    "text_config": WIDTH | {"vocab_size": 64},
    "projection_dim": 32,
}


@dataclass(frozen=True)
class Family:
    """side: what it reads and writes; kind: transformers' model_type; pad: the padding token's id, first:
    class token in front (else behind)."""

    side: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    pad: int = 0
    front: bool = True


FAMILIES: dict[str, Family] = {
    # encoders of text
    "ALBERT": Family("encoder", "albert", ENCODER | {"embedding_size": 16}),
    "BERT": Family("encoder", "bert", ENCODER),
    "BigBird": Family("encoder", "big_bird", ENCODER | {"block_size": 4}),
    "CamemBERT": Family("encoder", "camembert", ENCODER, pad=1),
    "ConvBERT": Family(
        "encoder", "convbert", ENCODER | {"embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}
    ),
    "Data2VecText": Family("encoder", "data2vec-text", ENCODER, pad=1),
    "DeBERTa": Family(
        "encoder", "deberta", ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    ),
    "DeBERTa v2": Family(
        "encoder", "deberta-v2", ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    ),
    "DistilBERT": Family(
        "encoder",
        "distilbert",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40},
    ),
    "ELECTRA": Family("encoder", "electra", ENCODER | {"embedding_size": 16}),
    "ERNIE": Family("encoder", "ernie", ENCODER),
    "ESM": Family(
        "encoder", "esm", ENCODER | {"position_embedding_type": "rotary", "mask_token_id": 4}, pad=1
    ),
    "EuroBERT": Family("encoder", "eurobert", DECODER),
    "FNet": Family("encoder", "fnet", ENCODER),
    "Funnel": Family(
        "encoder",
        "funnel",
        {
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 64,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        }
        | {"architectures": ["FunnelModel"]},
    ),
    "LayoutLM": Family("encoder", "layoutlm", ENCODER),
    "Longformer": Family("encoder", "longformer", ENCODER | {"attention_window": 4}, pad=1),
    "MegatronBERT": Family("encoder", "megatron-bert", ENCODER),
    "MobileBERT": Family(
        "encoder",
        "mobilebert",
        ENCODER | {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
    ),
    "ModernBERT": Family(
        "encoder", "modernbert", ENCODER | {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 6}
    ),
    "MPNet": Family("encoder", "mpnet", ENCODER, pad=1),
    "Nystromformer": Family(
        "encoder", "nystromformer", ENCODER | {"num_landmarks": 4, "segment_means_seq_len": 8}
    ),
    "RemBERT": Family(
        "encoder", "rembert", ENCODER | {"input_embedding_size": 16, "output_embedding_size": 16}
    ),
    "RoBERTa": Family("encoder", "roberta", ENCODER, pad=1),
    "RoFormer": Family("encoder", "roformer", ENCODER | {"embedding_size": 32}),
    "SqueezeBERT": Family("encoder", "squeezebert", ENCODER | {"embedding_size": 32}),
    "XLM-RoBERTa": Family("encoder", "xlm-roberta", ENCODER, pad=1),
    "XLNet": Family(
        "encoder", "xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, front=False
    ),
    # decoders of text
    "BLOOM": Family(
        "decoder", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    ),
    "CodeGen": Family("decoder", "codegen", GPT | {"rotary_dim": 4, "n_ctx": 64}),
    "Cohere": Family("decoder", "cohere", DECODER),
    "DeepSeek v3": Family(
        "decoder",
        "deepseek_v3",
        WIDTH
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        }
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "Falcon": Family(
        "decoder",
        "falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2},
    ),
    "Gemma": Family("decoder", "gemma", DECODER),
    "Gemma 2": Family("decoder", "gemma2", DECODER | {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "Gemma 3": Family("decoder", "gemma3_text", DECODER | {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "GLM 4": Family("decoder", "glm4", DECODER),
    "GPT-2": Family("decoder", "gpt2", GPT),
    "GPTBigCode": Family("decoder", "gpt_bigcode", GPT),
    "GPT-J": Family("decoder", "gptj", GPT | {"rotary_dim": 4}),
    "GPT-Neo": Family(
        "decoder",
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 64,
            "attention_types": [[["global", "local"], 1]],
        }
        | {"max_position_embeddings": 64, "window_size": 8, "initializer_range": 0.2},
    ),
    "GPT-NeoX": Family("decoder", "gpt_neox", DECODER),
    "GPT-OSS": Family(
        "decoder",
        "gpt_oss",
        DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "Granite": Family("decoder", "granite", DECODER),
    "Llama": Family("decoder", "llama", DECODER),
    "Mamba": Family("decoder", "mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "Mamba 2": Family(
        "decoder",
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
        },
    ),
    "Mistral": Family("decoder", "mistral", DECODER | {"sliding_window": 6}),
    "Mixtral": Family("decoder", "mixtral", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "MPT": Family(
        "decoder",
        "mpt",
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    "OLMo": Family("decoder", "olmo", DECODER),
    "OLMo 2": Family("decoder", "olmo2", DECODER),
    "OPT": Family(
        "decoder",
        "opt",
        WIDTH | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "init_std": 0.2},
        pad=1,
    ),
    "Phi": Family("decoder", "phi", DECODER),
    "Phi 3": Family("decoder", "phi3", DECODER),
    "Qwen 2": Family("decoder", "qwen2", DECODER),
    "Qwen 3": Family("decoder", "qwen3", DECODER),
    "Qwen 3 MoE": Family(
        "decoder",
        "qwen3_moe",
        DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "RWKV": Family(
        "decoder",
        "rwkv",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    ),
    "SmolLM 3": Family("decoder", "smollm3", DECODER),
    "StableLM": Family("decoder", "stablelm", DECODER),
    "StarCoder 2": Family("decoder", "starcoder2", DECODER),
    "XGLM": Family(
        "decoder",
        "xglm",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
        pad=1,
    ),
    # encoders and decoders in one
    "BART": Family("both", "bart", BART, pad=1),
    "mBART": Family("both", "mbart", BART, pad=1),
    "mT5": Family("both", "mt5", T5),
    "Pegasus": Family("both", "pegasus", BART),
    "T5": Family("both", "t5", T5),
    # images
    "BEiT": Family("image", "beit", VIT),
    "BiT": Family("image", "bit", STAGES | {"embedding_size": 8, "num_groups": 4}),
    "CLIP": Family("image", "clip", VISION),
    "ConvNeXT": Family("image", "convnext", STAGES),
    "ConvNeXT v2": Family("image", "convnextv2", STAGES),
    "CvT": Family(
        "image",
        "cvt",
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "drop_rate": [0.0, 0.0, 0.0]}
        | {"drop_path_rate": [0.0, 0.0, 0.0], "attention_drop_rate": [0.0, 0.0, 0.0]},
    ),
    "Data2VecVision": Family("image", "data2vec-vision", VIT),
    "DeiT": Family("image", "deit", VIT),
    "DINOv2": Family("image", "dinov2", VIT),
    "EfficientNet": Family(
        "image",
        "efficientnet",
        {
            "image_size": IMAGE_SIZE,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.25,
            "hidden_dim": 320,
            "kernel_sizes": [3, 3],
            "in_channels": [32, 16],
        }
        | {
            "out_channels": [16, 24],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 6],
            "depthwise_padding": [],
        },
    ),
    "FocalNet": Family(
        "image",
        "focalnet",
        {
            "image_size": IMAGE_SIZE,
            "embed_dim": 8,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
    "HGNet v2": Family(
        "image",
        "hgnet_v2",
        {
            "embedding_size": 8,
            "hidden_sizes": [16, 16, 16, 32],
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 16, 16, 16],
        }
        | {
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [16, 16, 16, 32],
            "stage_num_blocks": [1, 1, 1, 1],
            "depths": [1, 1, 1, 1],
        }
        | {"stage_numb_of_layers": [2, 2, 2, 2]},
    ),
    "ImageGPT": Family("image", "imagegpt", GPT | {"n_positions": 64}),
    "LeViT": Family(
        "image",
        "levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "MobileNet v1": Family(
        "image", "mobilenet_v1", {"depth_multiplier": 0.25, "image_size": IMAGE_SIZE, "min_depth": 4}
    ),
    "MobileNet v2": Family(
        "image", "mobilenet_v2", {"depth_multiplier": 0.25, "image_size": IMAGE_SIZE, "min_depth": 4}
    ),
    "MobileViT": Family(
        "image",
        "mobilevit",
        {
            "image_size": IMAGE_SIZE,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 64],
        },
    ),
    "PoolFormer": Family("image", "poolformer", STAGES | {"depths": [1, 1, 1, 1]}),
    "PVT v2": Family(
        "image",
        "pvt_v2",
        {
            "image_size": IMAGE_SIZE,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "mlp_ratios": [2, 2, 2, 2],
        },
    ),
    "RegNet": Family("image", "regnet", STAGES | {"embedding_size": 8, "groups_width": 8}),
    "ResNet": Family("image", "resnet", STAGES | {"embedding_size": 8}),
    "SegFormer": Family(
        "image",
        "segformer",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]},
    ),
    "SigLIP": Family("image", "siglip", VISION),
    "SwiftFormer": Family("image", "swiftformer", {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}),
    "Swin": Family(
        "image",
        "swin",
        {
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "Swin v2": Family(
        "image",
        "swinv2",
        {
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "ViT": Family("image", "vit", VIT),
    "ViT MSN": Family("image", "vit_msn", VIT),
}
