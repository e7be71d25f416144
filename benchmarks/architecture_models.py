"""Networks of timm and transformers, one of each architecture, small and with random weights, and inputs for them.

Nothing is downloaded.  Weights are drawn anew, so that no branch is switched off as it is where networks are initialised for
training, and BatchNorm has the statistics of inputs like those that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SOURCES", "Network"]

CLASSES = 10
VOCABULARY = 128
LENGTH = 24

#: The smallest model of each of timm's files.
TIMM = (
    "starnet_s050", "test_vit_relpos", "mobilevit_xxs", "edgenext_xx_small", "mobilenetv3_small_050", "tinynet_e",
    "repghostnet_050", "efficientvit_m0", "ghostnet_050", "cspnext_tiny", "iformer_t", "xcit_nano_12_p8_224",
    "cs3darknet_focus_s", "efficientvit_b0", "swiftformer_xs", "efficientformerv2_s0", "pvt_v2_b0", "convnext_atto",
    "fasternet_t0", "fastvit_t8", "lcnetv2_small", "inception_next_atto", "rexnet_100", "hardcorenas_b", "pit_ti_224",
    "repvit_m1", "mobileone_s0", "eva02_tiny_patch14_224", "convit_tiny", "coat_tiny", "deit_tiny_patch16_224",
    "vit_tiny_patch16_224", "hgnetv2_b0", "regnety_006", "shvit_s1", "vit_tiny_r_s16_p8_224", "cpubone_nano",
    "efficientvim_m1", "mambaout_femto", "crossvit_tiny_240", "maxvit_pico_rw_256", "dpn48b", "levit_128", "resnet14t",
    "nf_regnet_b1", "visformer_tiny", "eca_botnext26ts_256", "resnest14d", "csatv2", "resnetv2_18", "legacy_seresnet18",
    "cait_xxs24_224", "skresnet18", "densenet121", "gcvit_xxtiny", "tiny_vit_5m_224", "efficientformer_l1",
    "hrnet_w18_small", "lowformer_b0", "dla34", "nest_tiny", "gmlp_s16_224", "convmixer_768_32", "poolformer_s24",
    "vitamin_small_224", "vovnet39a", "xception", "inception_v3", "tnt_s_legacy_patch16_224", "rdnet_tiny",
    "twins_svt_small", "mvitv2_tiny", "res2next50", "volo_d1_224", "sam2_hiera_tiny", "xception41p", "sequencer2d_s",
    "hiera_tiny_224", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_384", "swinv2_tiny_window8_256", "davit_tiny",
    "focalnet_tiny_srf", "selecsls42", "tresnet_m", "nextvit_small", "inception_v4", "inception_resnet_v2",
)  # fmt: skip

#: What a number in a configuration of transformers is here, by its name.
_SIZES = {
    64: (
        "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim", "d_embed",
        "max_position_embeddings", "n_positions", "max_seq_len", "lru_width", "image_size", "emb_dim",
    ),
    128: (
        "intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim",
        "vocab_size", "entity_vocab_size", "shared_intermediate_size", "feed_forward_proj_dim", "block_ff_dim",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_key_value_heads", "num_experts_per_tok",
        "num_experts_per_token", "n_group", "mamba_n_groups", "topk_group", "first_k_dense_replace",
    ),
    1: ("encoder_layers", "decoder_layers", "n_shared_experts", "num_nextn_predict_layers"),
    4: (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_local_experts", "num_experts", "n_routed_experts", "mamba_n_heads",
    ),
    16: (
        "head_dim", "d_kv", "attention_head_size", "sliding_window", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim",
        "kv_lora_rank", "q_lora_rank", "state_size", "query_pre_attn_scalar", "attention_window", "num_mel_bins",
        "rotary_dim", "mamba_d_head", "mamba_d_state", "embed_dim_per_head", "hidden_size_per_layer_input",
    ),
    8: ("patch_size", "mamba_chunk_size", "chunk_size"),
    32: ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "max_source_positions"),
    0: ("pad_token_id", "dropout", "layerdrop"),
    3: ("bos_token_id",),
    5: ("eos_token_id", "decoder_start_token_id"),
}  # fmt: skip
_STAGED = {"depths", "depth", "num_layers", "layers", "num_blocks"}
_HEADS = {"num_attention_heads", "num_heads"}
_WIDTHS = {"hidden_sizes", "embed_dims", "embed_dim", "neck_hidden_sizes", "encoder_hidden_sizes"}

#: What fits together otherwise, by the type of the model.
_OWN: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 16, "patch_size": 2, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4]},
    "swinv2": {"embed_dim": 16, "patch_size": 2, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 16, "n_head": 4},
    "squeezebert": {
        "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2,
    },
    "hiera": {
        "image_size": [32, 32], "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "num_query_pool": 2,
        "masked_unit_size": [4, 4], "query_stride": [2, 2],
    },
    "mobilevit": {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 80]},
    "mobilevitv2": {"width_multiplier": 0.25},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "levit": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 1]},
    "bit": {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "num_groups": 4},
    "resnet": {"embedding_size": 16, "layer_type": "basic"},
    "regnet": {"embedding_size": 16, "groups_width": 8},
    "focalnet": {"embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "audio-spectrogram-transformer": {"frequency_stride": 8, "time_stride": 8, "max_length": 32},
    **{
        each: {
            "conv_dim": (16, 32), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2,
            "classifier_proj_size": 32, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
        }
        for each in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "sew", "sew-d", "data2vec-audio")
    },
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network and what to call it with.

    Attributes
    ----------
    model : nn.Module
        Full precision, in evaluation mode.
    calibration : list
        Batches of 16.
    unseen : Tensor or dict of Tensor
        A batch that the calibration does not hold.
    """

    model: nn.Module
    calibration: list[Any]
    unseen: Any


def _images(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Blobs, ramps and noise of different contrast and colour: of white noise alone networks would say much the same."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape

    def noise(*size: int) -> Tensor:
        return torch.randn(count, channels, *size, generator=generator)

    def share() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator)

    blobs = F.interpolate(noise(max(height // 8, 1), max(width // 8, 1)), (height, width), mode="bilinear")
    ramps = F.interpolate(noise(2, 2), (height, width), mode="bilinear")
    detail = blobs + 0.3 * noise(height, width)
    return detail * (0.2 + 1.2 * share()) + 1.5 * ramps * share() + 0.8 * noise(1, 1)


def _awake(model: nn.Module, inputs: Any) -> nn.Module:
    """Factors near 0, with which residual branches begin, drawn anew; statistics of BatchNorm measured."""
    generator = torch.Generator().manual_seed(0)

    def drawn(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            most = float(parameter.abs().max()) if parameter.numel() else 1.0
            if last.endswith("bias"):
                parameter.copy_(0.05 * drawn(parameter)) if most < 1e-6 else None
            elif most < 1e-3 and (parameter.ndim <= 1 or last in ("gamma", "ls", "alpha", "layer_scale")):
                parameter.copy_(0.4 + 0.6 * torch.rand(parameter.shape, generator=generator))
            elif most < 1e-6:
                parameter.copy_(0.05 * drawn(parameter))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all that passes
            norm.train()
        if norms:
            model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return model.eval()


def _timm(name: str) -> Network:
    """At 64 x 64 if it can be built for that, else at the least of some sizes."""
    import timm

    known = timm.get_pretrained_cfg(name)
    tries: list[tuple[dict[str, Any], tuple[int, int, int]]] = []
    for size in (64, 96, 128):
        tries.append(({"img_size": size}, (3, size, size)))
        if not (known and known.fixed_input_size):
            tries.append(({}, (3, size, size)))
    tries.append(({}, known.input_size if known else (3, 224, 224)))
    failure: Exception | None = None
    for options, shape in tries:
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options).eval()
            model = _awake(model, _images(32, shape, 3))
            with torch.no_grad():
                logits = model(_images(2, shape, 3))
        except Exception as error:  # what does not fit this size fails in as many ways as there are authors
            failure = error
            continue
        if torch.isfinite(logits).all():
            return Network(model, [_images(16, shape, 1), _images(16, shape, 4)], _images(16, shape, 2))
    raise RuntimeError(f"{name} was not built at any size: {failure}")


def _shrunk(name: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration is another number in a network of two layers."""
    sizes = {key: size for size, keys in _SIZES.items() for key in keys}
    if "qk_rope_head_dim" in configuration:  # a head is what rotates and what does not
        del sizes["head_dim"]
    changed: dict[str, Any] = {}
    for key, value in configuration.items():
        if isinstance(value, dict) and key.endswith("_config"):
            changed[key] = _shrunk(name, value)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(each, int) for each in value):
            if key in _STAGED:
                changed[key] = [1] * len(value)
            elif key in _HEADS:
                changed[key] = [2**i for i in range(len(value))]
            elif key in _WIDTHS:
                changed[key] = [16 * 2**i for i in range(len(value))]
        elif key in sizes and (value is None or isinstance(value, (int, float))):
            changed[key] = sizes[key]
    return changed


def _configuration(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    made = kind(**{"num_labels": CLASSES, **_shrunk(name, kind().to_dict()), **_OWN.get(name, {})})
    made.use_cache, made.architectures = False, []
    return made


def _ways() -> dict[str, tuple[str, Callable[[int, int], dict[str, Tensor]]]]:
    """Each type of model: the class that is taken of it and what goes in."""
    from transformers.models.auto import modeling_auto as auto

    def ids(count: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(6, VOCABULARY, (count, LENGTH), generator=generator)}

    def sentences(count: int, seed: int) -> dict[str, Tensor]:
        """Of different lengths, padded."""
        lengths = LENGTH - torch.arange(count) * 5 % (LENGTH - 8)
        mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
        return {"input_ids": ids(count, seed)["input_ids"] * mask, "attention_mask": mask}

    def images(count: int, seed: int) -> dict[str, Tensor]:
        return {"pixel_values": _images(count, (3, 64, 64), seed)}

    def sounds(count: int, seed: int) -> dict[str, Tensor]:
        noise = torch.randn(count, 800, generator=torch.Generator().manual_seed(seed))
        return {"input_values": 0.1 * noise.cumsum(1)}

    found: dict[str, tuple[str, Callable[[int, int], dict[str, Tensor]]]] = {}
    for task, auto_class, make in (
        ("IMAGE_CLASSIFICATION", "AutoModelForImageClassification", images),
        ("SEMANTIC_SEGMENTATION", "AutoModelForSemanticSegmentation", images),
        ("AUDIO_CLASSIFICATION", "AutoModelForAudioClassification", sounds),
        ("CAUSAL_LM", "AutoModelForCausalLM", ids),
        ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification", sentences),
    ):
        masked = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        for name in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES"):
            if task != "CAUSAL_LM" or name not in masked:  # encoders also have a head for the next token
                found.setdefault(name, (auto_class, make))
    return found


def _transformers(name: str) -> Network:
    import transformers

    auto_class, make = _ways()[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, auto_class).from_config(_configuration(name)).eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = 0.5 if "embed" in key else max(parameter[0].numel(), 1) ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model = _awake(model, make(32, 3))
    whole = make(32, 1)
    batches = [{key: value[i : i + 16] for key, value in whole.items()} for i in (0, 16)]
    return Network(model, batches, make(12, 2))


#: Names of architectures and what builds one, by library.
SOURCES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Network]]] = {
    "timm": (lambda: list(TIMM), _timm),
    "transformers": (lambda: list(_ways()), _transformers),
}
