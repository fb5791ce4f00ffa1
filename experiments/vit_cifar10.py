"""ViT-B/16, pretrained on ImageNet-21k, on CIFAR-10: block 12 and all after it learn.

The recipe of the study's DeiT, on the backbone without a classifier: the head reads the class token. Inputs are scaled
to [-1, 1], as that model was trained.

Command: python -m jaxtl.main --experiment=vit_cifar10

Expected: no published figure for this recipe; the nearest is 0.991 for a DeiT-base fine-tuned whole on all 50,000
images (Touvron et al. 2020).
"""

from jaxtl.config import Experiment, Head, Images, Model, Optim, Train
from jaxtl.training.freeze import train_from


def experiment() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        model=Model(
            preset="vit_base_patch16_224_in21k",
            weights="google/vit-base-patch16-224-in21k",
            image_size=224,
            head=Head(kind="mlp", reads="cls", hidden=256, dropout=0.5),
        ),
        data=Images(name="cifar10", train_size=5_000, eval_size=1_000, scale="half"),
        freeze=train_from("block_12"),
        optim=Optim(name="adam", learning_rate=1e-4),
        train=Train(epochs=4, batch_size=64),
    )
