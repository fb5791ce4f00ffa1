"""DeiT-base distilled on CIFAR-10 by the paper's rule: block 12 and all after it learn (8,886,234).

Malpure, Litake and Ingle (2021, arXiv:2110.05270): nothing before the last block learns. Otherwise as deit_cifar10.

Command: python -m jaxtl.main --experiment=deit_cifar10_lastblock

Expected: accuracy 0.9645 (reported by the paper, on all 50,000 images; 5,000 are used here).
"""

from jaxtl.config import Experiment, Head, Images, Model, Optim, Train
from jaxtl.training.freeze import train_from


def experiment() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        model=Model(
            preset="deit_base_distilled_patch16_224",
            weights="facebook/deit-base-distilled-patch16-224",
            image_size=224,
            head=Head(kind="mlp", reads="logits", hidden=256, dropout=0.5),
        ),
        data=Images(name="cifar10", train_size=5_000, eval_size=1_000, scale="unit"),
        freeze=train_from("block_12"),
        optim=Optim(name="adam", learning_rate=1e-4),
        train=Train(epochs=4, batch_size=64),
        reported=(("accuracy", 0.9645),),
    )
