"""Architectures by name: parameter counts against published numbers, and what does not fit together."""

import jax.numpy as jnp
import pytest

from jaxtl.models import presets, stages
from jaxtl.training.setup import count

# With the pretrained classifier where there is one. Sources: timm's model cards (deit_*_distilled_patch16_224,
# vit_*_patch16_224, vit_*_patch14_dinov2.lvd142m, vgg19.tv_in1k), which round to 10,000; exact: DeiT-base distilled and
# VGG19 from the study's own tables, ViT-B/16 and ViT-L/16 from torchvision's model cards.
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
    # 4 blocks of 12 D^2 + 13 D, norm 2 D, class token D, 17 positions, patches 12 D + D; D = 64
    "vit_nano_patch2_8": 4 * (12 * 64**2 + 13 * 64) + 2 * 64 + 64 + 17 * 64 + 13 * 64,
}


def parameters(name, with_classifier):
    config = presets.PRESETS[name]
    _, params, _ = stages.abstract(
        lambda rngs: presets.backbone(config, with_classifier=with_classifier, dtype=jnp.float32, rngs=rngs)
    )
    return count(params)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameter_count_is_the_published_one(name):
    published = PUBLISHED[name]
    counted = parameters(name, with_classifier=presets.PRESETS[name].classes is not None)
    if isinstance(published, int):
        assert counted == published
    else:
        assert round(counted / 1e4) == round(published / 1e4)


def test_vgg19_without_its_classifier_has_the_published_count():
    assert parameters("vgg19", with_classifier=False) == 20_024_384


@pytest.mark.parametrize(
    ("preset", "reads", "size", "message"),
    [
        ("dinov2_small", "cls", 225, "multiple of the patch size 14: 224 or 238"),
        ("dinov2_small", "logits", 224, "reads cls or cls_patches, not logits"),
        ("deit_tiny_distilled_patch16_224", "cls_patches", 224, "reads cls or logits, not cls_patches"),
        ("vgg19", "cls", 224, "reads flatten or logits, not cls"),
        ("vgg19", "logits", 192, "224 pixels only"),
        ("vgg19", "flatten", 16, "at least 32 pixels"),
    ],
)
def test_head_image_size_and_backbone_that_do_not_fit_are_refused(preset, reads, size, message):
    with pytest.raises(ValueError, match=message):
        presets.classifier(
            presets.PRESETS[preset],
            kind="fc",
            reads=reads,
            hidden=8,
            dropout=0.0,
            classes=3,
            image_size=size,
            precision="float32",
        )


@pytest.mark.parametrize(("reads", "inputs"), [("cls", 64), ("cls_patches", 128)])
def test_head_reads_what_it_is_told_to(reads, inputs):
    build = presets.classifier(
        presets.PRESETS["vit_nano_patch2_8"],
        kind="fc",
        reads=reads,
        hidden=8,
        dropout=0.0,
        classes=3,
        image_size=8,
        precision="float32",
    )
    _, params, names = stages.abstract(build)
    assert names[-1] == "head"
    assert params["head/output/kernel"].shape == (inputs, 3)
