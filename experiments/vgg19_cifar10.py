"""VGG19 on CIFAR-10 as in the study: block5_conv1 and all after it learn (15,864,586).

The study used Keras's ImageNet weights; these are torchvision's, as timm publishes them. 5,000 images, 10 epochs.

Command: python -m jaxtl.main --experiment=vgg19_cifar10

Expected: accuracy 0.852, loss 0.62 on 1,000 held-out images (reported by the study).
"""

from jaxtl.config import Experiment, Head, Images, Model, Optim, Train
from jaxtl.training.freeze import train_from


def experiment() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        model=Model(
            preset="vgg19",
            weights="timm/vgg19.tv_in1k",
            image_size=224,
            head=Head(kind="mlp", reads="flatten", hidden=256, dropout=0.5),
        ),
        data=Images(name="cifar10", train_size=5_000, eval_size=1_000, scale="unit"),
        freeze=train_from("block5_conv1"),
        optim=Optim(name="adam", learning_rate=1e-4),
        train=Train(epochs=10, batch_size=64),
        reported=(("accuracy", 0.852), ("loss", 0.62), ("train_loss", 0.06), ("trainable_parameters", 15_864_586)),
    )
