"""DINOv2-small on CIFAR-10: block 12, the final norm and the head learn, on inputs normalised as the model's were.

Command: python -m jaxtl.main --experiment=dinov2_cifar10

Expected: below the 0.977 that a linear probe of ViT-S/14 reaches on all 50,000 images (Oquab et al. 2023), since 5,000
are used.
"""

from jaxtl.config import Experiment, Head, Images, Model, Optim, Train
from jaxtl.training.freeze import train_from


def experiment() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        model=Model(
            preset="dinov2_small",
            weights="facebook/dinov2-small",
            image_size=224,
            head=Head(kind="mlp", reads="cls", hidden=256, dropout=0.5),
        ),
        data=Images(name="cifar10", train_size=5_000, eval_size=1_000, scale="imagenet"),
        freeze=train_from("block_12"),
        optim=Optim(name="adam", learning_rate=1e-4),
        train=Train(epochs=4, batch_size=64),
    )
