"""Transformer architectures for the coverage table, tiny and with random weights.

In: nothing. Out: name -> a function that builds (model, args, kwargs). Invariant: every configuration is made from the
library's own defaults, shrunk; nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

# Given to every configuration that has the field.
_SMALL: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
        "image_size": 32,
        "patch_size": 8,
    }
)


@dataclass(frozen=True)
class Architecture:
    """One architecture: model class, kind of inputs, settings beyond the common small ones."""

    model: str
    kind: str = "ids"
    settings: Mapping[str, Any] = field(default_factory=dict)


_ENCDEC = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_ENCDEC |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_CONV = {"conv_dim": (16, 16, 16), "conv_stride": (4, 2, 2), "conv_kernel": (8, 3, 3), "num_feat_extract_layers": 3}
_CONV |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_STATE = {"state_size": 8, "n_groups": 1, "num_heads": 8, "expand": 2, "conv_kernel": 4, "chunk_size": 4}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        # encoders
        "bert": Architecture("BertForSequenceClassification"),
        "bert (masked)": Architecture("BertForMaskedLM"),
        "roberta": Architecture("RobertaModel"),
        "distilbert": Architecture(
            "DistilBertModel", settings={"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4}
        ),
        "albert": Architecture("AlbertModel", settings={"embedding_size": 16}),
        "electra": Architecture("ElectraModel", settings={"embedding_size": 16}),
        "deberta-v2": Architecture("DebertaV2Model"),
        "mpnet": Architecture("MPNetModel"),
        "camembert": Architecture("CamembertModel"),
        "xlm-roberta": Architecture("XLMRobertaModel"),
        "convbert": Architecture("ConvBertModel", settings={"embedding_size": 32}),
        "fnet": Architecture("FNetModel"),
        "modernbert": Architecture(
            "ModernBertModel", settings={"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}
        ),
        "esm": Architecture("EsmModel", settings={"mask_token_id": 3}),
        "roformer": Architecture("RoFormerModel", settings={"embedding_size": 32}),
        # decoders
        "gpt2": Architecture("GPT2LMHeadModel", settings={"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
        "gpt-neo": Architecture(
            "GPTNeoForCausalLM",
            settings={"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
        ),
        "gpt-neox": Architecture("GPTNeoXForCausalLM"),
        "gptj": Architecture(
            "GPTJForCausalLM", settings={"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
        ),
        "opt": Architecture(
            "OPTForCausalLM", settings={"ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4}
        ),
        "bloom": Architecture("BloomForCausalLM", settings={"n_layer": 4, "n_head": 4}),
        "llama": Architecture("LlamaForCausalLM"),
        "mistral": Architecture("MistralForCausalLM", settings={"sliding_window": 4}),
        "qwen2": Architecture("Qwen2ForCausalLM"),
        "qwen3": Architecture("Qwen3ForCausalLM"),
        "gemma": Architecture("GemmaForCausalLM"),
        "gemma2": Architecture("Gemma2ForCausalLM", settings={"sliding_window": 4, "query_pre_attn_scalar": 8}),
        "phi": Architecture("PhiForCausalLM"),
        "phi3": Architecture("Phi3ForCausalLM"),
        "falcon": Architecture("FalconForCausalLM", settings={"new_decoder_architecture": False}),
        "stablelm": Architecture("StableLmForCausalLM"),
        "olmo": Architecture("OlmoForCausalLM"),
        "cohere": Architecture("CohereForCausalLM"),
        "smollm3": Architecture("SmolLM3ForCausalLM"),
        "granite": Architecture("GraniteForCausalLM"),
        "mixtral": Architecture("MixtralForCausalLM", settings={**_EXPERTS, "experts_implementation": "batched_mm"}),
        # encoder-decoders
        "t5": Architecture(
            "T5ForConditionalGeneration",
            "encdec",
            {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
        ),
        "bart": Architecture("BartForConditionalGeneration", "encdec", _ENCDEC),
        "pegasus": Architecture("PegasusForConditionalGeneration", "encdec", _ENCDEC),
        "marian": Architecture("MarianMTModel", "encdec", {**_ENCDEC, "decoder_start_token_id": 0}),
        "whisper": Architecture(
            "WhisperForConditionalGeneration",
            "speech",
            {**_ENCDEC, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
        ),
        # vision
        "vit": Architecture("ViTForImageClassification", "image"),
        "deit": Architecture("DeiTForImageClassification", "image"),
        "beit": Architecture("BeitForImageClassification", "image"),
        "dinov2": Architecture("Dinov2ForImageClassification", "image"),
        "swin": Architecture(
            "SwinForImageClassification",
            "image",
            {
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 2,
                "patch_size": 4,
                "image_size": 32,
            },
        ),
        "convnext": Architecture(
            "ConvNextForImageClassification",
            "image",
            {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "patch_size": 4},
        ),
        "resnet": Architecture(
            "ResNetForImageClassification",
            "image",
            {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
        ),
        "segformer": Architecture(
            "SegformerForImageClassification",
            "image",
            {
                "hidden_sizes": [8, 16, 16, 32],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 2, 2, 4],
                "patch_sizes": [7, 3, 3, 3],
            },
        ),
        "mobilevit": Architecture(
            "MobileViTForImageClassification",
            "image",
            {
                "hidden_sizes": [16, 24, 32],
                "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
                "patch_size": 2,
                "image_size": 64,
            },
        ),
        "clip vision": Architecture("CLIPVisionModel", "image"),
        "siglip vision": Architecture("SiglipVisionModel", "image"),
        # audio
        "wav2vec2": Architecture("Wav2Vec2Model", "audio", _CONV),
        "hubert": Architecture("HubertModel", "audio", _CONV),
        # state space and recurrent
        "mamba": Architecture("MambaForCausalLM", settings={"state_size": 8, "time_step_rank": 4, "conv_kernel": 4}),
        "mamba2": Architecture("Mamba2ForCausalLM", settings={**_STATE, "head_dim": 8}),
        "recurrent-gemma": Architecture(
            "RecurrentGemmaForCausalLM", settings={"lru_width": 32, "attention_window_size": 8}
        ),
        "xlstm": Architecture("xLSTMForCausalLM", settings={"num_heads": 2, "num_blocks": 4, "chunk_size": 8}),
        "falcon-mamba": Architecture("FalconMambaForCausalLM", settings={"state_size": 8, "time_step_rank": 4}),
    }
)


def architectures() -> Mapping[str, Callable[[], Built]]:
    """Every architecture by name."""
    import transformers  # noqa: F401  (so that a missing library is said before a run starts)

    return {n: functools.partial(_build, a) for n, a in ARCHITECTURES.items()}


def _build(architecture: Architecture) -> Built:
    import transformers

    kind = getattr(transformers, architecture.model)
    default = kind.config_class()
    given = {default.attribute_map.get(k, k) for k in architecture.settings}
    settings = {
        k: v
        for k, v in _SMALL.items()
        if hasattr(default, k)
        and default.attribute_map.get(k, k) not in given
        and not isinstance(vars(kind.config_class).get(k), property)
    }
    config = kind.config_class(**{**settings, **architecture.settings})
    return kind(config), *_inputs(architecture.kind, config)


def _inputs(kind: str, config: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = torch.randint(3, 64, (2, 8))
    size = getattr(config, "image_size", 32)
    return {
        "ids": lambda: ((ids,), {}),
        "encdec": lambda: ((), {"input_ids": ids, "decoder_input_ids": ids[:, :6]}),
        "speech": lambda: ((), {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids[:, :6]}),
        "image": lambda: ((torch.randn(2, 3, size, size),), {}),
        "audio": lambda: ((torch.randn(2, 800),), {}),
    }[kind]()
