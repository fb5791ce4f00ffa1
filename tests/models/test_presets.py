"""Architectures by name: parameter counts against published numbers, and what does not fit together."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxtl.models import presets, stages
from jaxtl.training.setup import count

# With the pretrained classifier where there is one, BERT with its pooler. Sources: timm's model cards
# (deit_*_distilled_patch16_224, vit_*_patch16_224, vit_*_patch14_dinov2.lvd142m, vgg19.tv_in1k), which round to 10,000;
# exact: DeiT-base distilled and VGG19 from the study's tables, ViT-B/16 and ViT-L/16 from torchvision's model cards.
PUBLISHED = {
    "deit_tiny_distilled_patch16_224": 5.91e6,
    "deit_small_distilled_patch16_224": 22.44e6,
    "deit_base_distilled_patch16_224": 87_338_192,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_224_in21k": 85_798_656,
    "vit_large_patch16_224": 304_326_632,
    "dinov2_small": 22.06e6,
    "dinov2_base": 86.58e6,
    "dinov2_large": 304.37e6,
    "dinov2_giant": 1136.48e6,
    "vgg19": 143_667_240,
    # Devlin et al. 2018 say 110M and 340M for BERT-base and BERT-large; exact: transformers' BertModel of that size.
    "bert_base_uncased": 109_482_240,
    "bert_base_cased": 108_310_272,
    "bert_large_uncased": 335_141_888,
    "covid_twitter_bert_v2": 335_141_888,
    "minilm_l6": 22_713_216,
    # 30522 words, 128 positions, 2 token types and norm 2 D; 2 layers of 4 D^2 + 4 D, 2 * 128 D + 128 + D and norms
    # 4 D; pooler D^2 + D; D = 64
    "bert_nano": (30522 + 128 + 2 + 2) * 64 + 2 * (4 * 64**2 + 9 * 64 + 2 * 128 * 64 + 128) + 64**2 + 64,
    # 4 blocks of 12 D^2 + 13 D, norm 2 D, class token D, 17 positions, patches 12 D + D; D = 64
    "vit_nano_patch2_8": 4 * (12 * 64**2 + 13 * 64) + 2 * 64 + 64 + 17 * 64 + 13 * 64,
}


def parameters(name, top=None):
    config = presets.PRESETS[name]
    _, params, _ = stages.abstract(lambda rngs: presets.backbone(config, top=top, dtype=jnp.float32, rngs=rngs))
    return count(params)


def images(size):
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def texts(length, read=None):
    ids, lengths = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return stages.Sequence(ids, lengths, None if read is None else jax.ShapeDtypeStruct((1, read), jnp.int32))


def model(preset, kind, reads, inputs, classes=3):
    return presets.model(
        presets.PRESETS[preset],
        kind=kind,
        reads=reads,
        hidden=8,
        dropout=0.0,
        init="zero",
        classes=classes,
        inputs=inputs,
        precision="float32",
    )


@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameter_count_is_the_published_one(name):
    config, published = presets.PRESETS[name], PUBLISHED[name]
    if config.family == "bert":
        counted = parameters(name, "pooler")
    else:
        counted = parameters(name, "classifier" if config.classes else None)
    if isinstance(published, int):
        assert counted == published
    else:
        assert round(counted / 1e4) == round(published / 1e4)


def test_vgg19_without_its_classifier_has_the_published_count():
    assert parameters("vgg19") == 20_024_384


def test_tied_decoder_adds_no_second_table_of_words():
    # Dense D^2 + D, layer norm 2 D, and a bias for each word; D = 768.
    assert parameters("bert_base_uncased", "mlm") - parameters("bert_base_uncased") == 768**2 + 3 * 768 + 30_522


def test_top_that_a_backbone_does_not_have_is_refused():
    with pytest.raises(ValueError, match="a bert backbone has a pooler or a mlm on top, no classifier"):
        parameters("bert_nano", "classifier")


@pytest.mark.parametrize(
    ("preset", "kind", "reads", "inputs", "message"),
    [
        ("dinov2_small", "fc", "cls", images(225), "multiple of the patch size 14: 224 or 238"),
        ("dinov2_small", "fc", "logits", images(224), "reads cls or cls_patches, not logits"),
        ("deit_tiny_distilled_patch16_224", "mlp", "cls_patches", images(224), "reads cls or logits, not cls_patches"),
        ("vgg19", "fc", "cls", images(224), "reads flatten or logits, not cls"),
        ("vgg19", "fc", "logits", images(192), "224 pixels only"),
        ("vgg19", "fc", "flatten", images(16), "at least 32 pixels"),
        ("dinov2_small", "bigru", "sequence", images(224), "head of a dinov2 backbone is fc or mlp, not bigru"),
        ("vgg19", "mlm", "masked", images(224), "head of a vgg backbone is fc or mlp, not mlm"),
        ("dinov2_small", "fc", "cls", texts(8), "a dinov2 backbone takes images, not texts"),
        ("bert_nano", "fc", "cls", images(224), "a bert backbone takes texts, not images"),
        ("bert_nano", "fc", "sequence", texts(8), "kind fc on a bert backbone reads cls or pooled, not sequence"),
        ("bert_nano", "mlp", "logits", texts(8), "reads cls or pooled, not logits"),
        ("bert_nano", "bigru", "cls", texts(8), "kind bigru on a bert backbone reads sequence, not cls"),
        ("bert_nano", "mlm", "cls", texts(8, 2), "kind mlm on a bert backbone reads masked, not cls"),
        ("bert_nano", "mlm", "masked", texts(8), "positions to read are given for masked language modelling"),
        ("bert_nano", "fc", "cls", texts(8, 2), "and for nothing else"),
        ("bert_nano", "fc", "cls", texts(129), "texts of 129 tokens are longer than this backbone's 128 positions"),
    ],
)
def test_head_input_and_backbone_that_do_not_fit_are_refused(preset, kind, reads, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(preset, kind, reads, inputs)


@pytest.mark.parametrize(
    ("preset", "kind", "reads", "inputs", "last_stages", "path", "shape"),
    [
        ("vit_nano_patch2_8", "fc", "cls", images(8), ("features", "head"), "head/output/kernel", (64, 3)),
        ("vit_nano_patch2_8", "fc", "cls_patches", images(8), ("features", "head"), "head/output/kernel", (128, 3)),
        ("deit_tiny_distilled_patch16_224", "fc", "logits", images(224), ("classifier", "head"),
         "head/output/kernel", (1000, 3)),
        ("bert_nano", "mlp", "cls", texts(8), ("features", "head"), "head/hidden/kernel", (64, 8)),
        ("bert_nano", "fc", "pooled", texts(8), ("pooler", "head"), "head/output/kernel", (64, 3)),
        ("bert_nano", "bigru", "sequence", texts(8), ("layer_2", "head"), "head/forward/input_kernel", (64, 24)),
        ("bert_nano", "bigru", "sequence", texts(8), ("layer_2", "head"), "head/output/kernel", (16, 3)),
        ("bert_nano", "mlm", "masked", texts(8, 2), ("layer_2", "features", "mlm"), "mlm/bias", (30_522,)),
    ],
)  # fmt: skip
def test_head_reads_what_it_is_told_to(preset, kind, reads, inputs, last_stages, path, shape):
    _, params, names = stages.abstract(model(preset, kind, reads, inputs))
    assert names[-len(last_stages) :] == last_stages
    assert params[path].shape == shape
    assert ("features" in names) == ("features" in last_stages)


def test_two_classes_share_one_node():
    for preset, inputs in (("vit_nano_patch2_8", images(8)), ("bert_nano", texts(8))):
        for classes, nodes in ((2, 1), (3, 3), (10, 10)):
            _, params, _ = stages.abstract(model(preset, "mlp", "cls", inputs, classes))
            assert params["head/output/kernel"].shape == (8, nodes)


def test_dropout_rates_do_not_make_another_architecture_but_sizes_do():
    config = presets.PRESETS["minilm_l6"]
    assert not presets.same_architecture(
        dataclasses.replace(config, hidden_dropout=0.0, attention_dropout=0.2, norm_epsilon=1e-6), config
    )
    cased = presets.PRESETS["bert_base_cased"]
    assert presets.same_architecture(cased, presets.PRESETS["bert_base_uncased"]) == ["vocabulary 28996 against 30522"]
    assert presets.same_architecture(cased, presets.PRESETS["dinov2_base"]) == ["family bert against dinov2"]
