"""Tables and converter: both directions, and one message for everything that does not fit."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtl.errors import UserError
from jaxtl.models import presets, stages
from jaxtl.weights import configs, convert, tables

TOPS = {
    "vgg": lambda config: ["classifier"],
    "bert": lambda config: ["pooler", "mlm"],
    **dict.fromkeys(("vit", "deit", "dinov2"), lambda config: ["classifier"] if config.classes else []),
}
NANO = presets.PRESETS["vit_nano_patch2_8"]


def abstract(config, top=None):
    _, params, _ = stages.abstract(lambda rngs: presets.backbone(config, top=top, dtype=jnp.float32, rngs=rngs))
    return params


def values(targets):
    random = np.random.default_rng(0)
    return {path: random.standard_normal(leaf.shape).astype(np.float32) for path, leaf in targets.items()}


@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("deit_tiny_distilled_patch16_224", "classifier"),
        ("vit_nano_patch2_8", None),
        ("dinov2_small", None),
        ("bert_nano", "pooler"),
        ("bert_nano", "mlm"),
    ],
)
def test_writing_and_reading_again_gives_the_same_parameters(name, top):
    config = presets.PRESETS[name]
    targets = abstract(config, top)
    table = tables.table(config, top=top)
    params = values(targets)
    written = convert.write(table, params, prefix=f"{config.family}.")
    assert len(written) == len(params)
    for path, value in convert.read(table, written, targets, "here").items():
        np.testing.assert_array_equal(value, params[path], path)


def test_every_parameter_of_every_preset_has_a_row_and_every_row_a_parameter():
    # Two blocks: the others have the same names.
    shallow = {
        name: dataclasses.replace(config, depth=2) if hasattr(config, "depth") else config
        for name, config in presets.PRESETS.items()
    }
    different = {config: name for name, config in shallow.items()}
    for config, name in different.items():
        for top in (None, *TOPS[config.family](config)):
            rows = [row.path for row in tables.table(config, top=top).rows]
            assert sorted(rows) == sorted(abstract(config, top)), name


def test_all_mismatches_are_told_in_one_message():
    table, targets = tables.table(NANO, top=None), abstract(NANO)
    source = convert.write(table, values(targets))
    del source["layernorm.weight"]
    source["embeddings.cls_token"] = source["embeddings.cls_token"][..., :-1]
    source["encoder.layer.0.output.dense.weight"] = source["encoder.layer.0.output.dense.weight"][:, 0]
    source["encoder.layer.9.new"] = np.zeros(1, np.float32)
    with pytest.raises(UserError) as error:
        convert.read(table, source, targets, "weights/x")
    message = str(error.value)
    assert message.startswith("weights/x is not a checkpoint of this model")
    assert "missing: norm/scale (their layernorm.weight)" in message
    assert "embeddings/class_token: 1x1x64 here, 1x1x63 there" in message
    assert "block_1/mlp/fc2/kernel: 256x64 here, 64 there" in message
    assert "not understood: encoder.layer.9.new" in message
    assert "\n" not in message


def test_mismatch_of_every_block_is_told_once():
    table, targets = tables.table(NANO, top=None), abstract(NANO)
    source = convert.write(table, values(targets))
    source = {name: value for name, value in source.items() if not name.endswith("output.dense.bias")}
    with pytest.raises(UserError) as error:
        convert.read(table, source, targets, "weights/x")
    theirs = "encoder.layer.*.attention.output.dense.bias"
    assert f"block_*/attention/output/bias (their {theirs}) in 4 blocks" in str(error.value)
    assert "block_1/" not in str(error.value)


def test_pooler_mask_token_and_unread_classifier_are_left_aside_by_name():
    table, targets = tables.table(NANO, top=None), abstract(NANO)
    source = convert.write(table, values(targets), prefix="vit.")
    source |= {name: np.zeros(1, np.float32) for name in ("pooler.dense.weight", "classifier.bias")}
    source["vit.embeddings.mask_token"] = np.zeros((1, 1, 64), np.float32)
    assert convert.read(table, source, targets, "here").keys() == targets.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json is missing"),
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object"),
        ("{}", "describes 'no model_type'"),
        ('{"model_type": "gpt2"}', "describes 'gpt2'; jaxtl has vit, deit, dinov2"),
        ('{"model_type": "vit", "hidden_act": "quick_gelu"}', "does not have hidden_act='quick_gelu'"),
        ('{"model_type": "vit", "num_channels": 1}', "does not have num_channels=1"),
        ('{"model_type": "dinov2", "drop_path_rate": 0.1}', "does not have drop_path_rate=0.1"),
        ('{"model_type": "vit", "hidden_size": "wide"}', "not a valid vit config"),
        ('{"model_type": "vit", "patch_size": 0}', "patch_size=0 must be whole numbers"),
        ('{"model_type": "vit", "num_attention_heads": 7}', "does not divide into 7 heads"),
        (
            '{"model_type": "bert", "position_embedding_type": "relative_key"}',
            "does not have position_embedding_type='relative_key'",
        ),
        ('{"model_type": "bert", "is_decoder": true}', "does not have is_decoder=True"),
        ('{"model_type": "bert", "add_cross_attention": true}', "does not have add_cross_attention=True"),
        ('{"model_type": "bert", "hidden_act": "mish"}', "does not have hidden_act='mish'"),
        ('{"model_type": "bert", "vocab_size": 0}', "vocab_size=0 must be whole numbers"),
    ],
)
def test_config_that_cannot_be_used_is_one_clear_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        configs.read_config(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_come_from_config_json(tmp_path):
    fields = dict(model_type="dinov2", hidden_size=96, num_hidden_layers=3, num_attention_heads=4, patch_size=14)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"use_swiglu_ffn": True, "image_size": 518}))
    config = configs.read_config(tmp_path)
    assert (config.width, config.depth, config.heads, config.grid) == (96, 3, 4, 37)
    # DINOv2's giant: 4 * 96 * 2 / 3 = 256
    assert config.mlp_width == 256
    assert config.layer_scale == 1.0


def test_bert_config_is_that_of_the_preset_and_a_classifiers_dropout_is_left_aside(tmp_path):
    fields = dict(model_type="bert", vocab_size=28996, classifier_dropout=0.3, hidden_dropout_prob=0.2)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"position_embedding_type": "absolute"}))
    config = configs.read_config(tmp_path)
    assert config == dataclasses.replace(presets.PRESETS["bert_base_cased"], hidden_dropout=0.2)


def test_timm_config_of_vgg19(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vgg19", "num_classes": 1000, "num_features": 4096}')
    assert configs.read_config(tmp_path) == presets.PRESETS["vgg19"]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_config_json_of_every_preset_is_read_as_that_preset(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(configs.fields(presets.PRESETS[name])))
    read = configs.read_config(tmp_path)
    # The classifier of ViT and DeiT is told by the class that the file names, which is not the architecture's to say.
    expected = presets.PRESETS[name]
    assert read == (expected if expected.family in ("vgg", "bert") else dataclasses.replace(expected, classes=None))
