"""The architecture that a `config.json` describes: Hugging Face's, and timm's for VGG19."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from jaxtl.errors import UserError
from jaxtl.models.bert import BertConfig
from jaxtl.models.layers import ACTIVATIONS
from jaxtl.models.presets import Config
from jaxtl.models.vgg import VGGConfig
from jaxtl.models.vit import ViTConfig


def read_config(folder: Path) -> Config:
    """Returns the config of the checkpoint in a folder.

    Raises:
        UserError: `config.json` is missing, unreadable, or describes a model that jaxtl does not have.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it says which architecture the weights beside it have") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not a model config: it must hold a JSON object")
    if fields.get("architecture") == "vgg19":  # timm
        return VGGConfig(classes=fields.get("num_classes", 1000))
    model_type = fields.get("model_type")
    if model_type not in _READERS:
        described = fields.get("architecture") or model_type or "no model_type"
        raise UserError(f"{path} describes {described!r}; jaxtl has {', '.join(_READERS)} and timm's vgg19")
    from transformers import AutoConfig  # fills in what the file leaves to the defaults

    try:
        return _READERS[model_type](AutoConfig.for_model(**fields), path)
    except UserError:
        raise
    except Exception as error:  # transformers validates with several kinds of exception
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a valid {model_type} config: {reason}") from None


def _vit(fields: Any, path: Path) -> ViTConfig:
    _supported(fields, path, num_channels=(3,), hidden_act=ACTIVATIONS, drop_path_rate=(0.0, None))
    dinov2 = fields.model_type == "dinov2"
    swiglu = dinov2 and fields.use_swiglu_ffn
    mlp_width = _dinov2_mlp_width(fields.hidden_size, fields.mlp_ratio, swiglu) if dinov2 else fields.intermediate_size
    _sound(fields, path, mlp=mlp_width, patch_size=_side(fields.patch_size), image_size=_side(fields.image_size))
    # Of DeiT's two classifiers, the one without the teacher's head is no part of what we call its classifier.
    classifier = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassificationWithTeacher"}
    with_classifier = classifier.get(fields.model_type) in (fields.architectures or ())
    return ViTConfig(
        family=fields.model_type,
        width=fields.hidden_size,
        depth=fields.num_hidden_layers,
        heads=fields.num_attention_heads,
        mlp_width=mlp_width,
        patch_size=_side(fields.patch_size),
        image_size=_side(fields.image_size),
        classes=fields.num_labels if with_classifier else None,
        activation=fields.hidden_act,
        norm_epsilon=fields.layer_norm_eps,
        qkv_bias=fields.qkv_bias,
        layer_scale=fields.layerscale_value if dinov2 else None,
        swiglu=swiglu,
        hidden_dropout=fields.hidden_dropout_prob,
        attention_dropout=fields.attention_probs_dropout_prob,
    )


def _dinov2_mlp_width(width: int, ratio: float, swiglu: bool) -> int:
    mlp_width = int(width * ratio)
    return (int(mlp_width * 2 / 3) + 7) // 8 * 8 if swiglu else mlp_width  # two thirds, up to a multiple of 8


def _bert(fields: Any, path: Path) -> BertConfig:
    _supported(
        fields,
        path,
        hidden_act=ACTIVATIONS,
        position_embedding_type=("absolute", None),
        tie_word_embeddings=(True, None),
        is_decoder=(False, None),
        add_cross_attention=(False, None),
    )
    sizes = {
        "vocab_size": fields.vocab_size,
        "intermediate_size": fields.intermediate_size,
        "max_position_embeddings": fields.max_position_embeddings,
        "type_vocab_size": fields.type_vocab_size,
    }
    _sound(fields, path, **sizes)
    return BertConfig(
        family="bert",
        vocabulary=fields.vocab_size,
        width=fields.hidden_size,
        depth=fields.num_hidden_layers,
        heads=fields.num_attention_heads,
        mlp_width=fields.intermediate_size,
        positions=fields.max_position_embeddings,
        token_types=fields.type_vocab_size,
        activation=fields.hidden_act,
        norm_epsilon=fields.layer_norm_eps,
        hidden_dropout=fields.hidden_dropout_prob,
        attention_dropout=fields.attention_probs_dropout_prob,
    )


_READERS = {"vit": _vit, "deit": _vit, "dinov2": _vit, "bert": _bert}


def fields(config: Config) -> dict[str, Any]:
    """Returns what a `config.json` says of an architecture; `read_config` is the inverse, but for a classifier."""
    if isinstance(config, VGGConfig):
        return {"architecture": "vgg19", "num_classes": config.classes, "num_features": config.hidden}
    found = {
        "model_type": config.family,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }
    if isinstance(config, BertConfig):
        return found | {
            "vocab_size": config.vocabulary,
            "intermediate_size": config.mlp_width,
            "max_position_embeddings": config.positions,
            "type_vocab_size": config.token_types,
        }
    found |= {"patch_size": config.patch_size, "image_size": config.image_size, "qkv_bias": config.qkv_bias}
    if config.family != "dinov2":
        return found | {"intermediate_size": config.mlp_width}
    widths = {_dinov2_mlp_width(config.width, ratio, config.swiglu): ratio for ratio in range(16, 0, -1)}
    return found | {
        "mlp_ratio": widths[config.mlp_width],
        "use_swiglu_ffn": config.swiglu,
        "layerscale_value": config.layer_scale,
        "use_mask_token": False,  # of pretraining, and no weight of ours
    }


def _supported(fields: Any, path: Path, **supported: Container[Any]) -> None:
    """Raises UserError with every field whose value is not among those that jaxtl has; an absent one is None."""
    values = {name: getattr(fields, name, None) for name in supported}
    if wrong := [f"{name}={value!r}" for name, value in values.items() if value not in supported[name]]:
        raise UserError(f"{path}: jaxtl does not have {', '.join(wrong)}")


def _sound(fields: Any, path: Path, **sizes: Any) -> None:
    """Raises UserError where a size is no whole number, or the width does not divide into heads."""
    sizes |= {name: getattr(fields, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    if wrong := [f"{name}={value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]:
        raise UserError(f"{path} is not a valid {fields.model_type} config: {', '.join(wrong)} must be whole numbers")
    if fields.hidden_size % fields.num_attention_heads:
        raise UserError(
            f"{path}: hidden_size={fields.hidden_size} does not divide into {fields.num_attention_heads} heads"
        )


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]
