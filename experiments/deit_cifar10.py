"""DeiT-base distilled on CIFAR-10 as in the study: blocks 1 to 11 are frozen, all else learns (9,630,426).

The study's own count shows that its embeddings kept learning below the frozen blocks; deit_cifar10_lastblock has the
rule its paper states. 5,000 images, 4 epochs.

Command: python -m jaxtl.main --experiment=deit_cifar10

Expected: accuracy 0.967, loss 0.118 on 1,000 held-out images (reported by the study).
"""

from jaxtl.config import Experiment, Head, Images, Model, Optim, Train
from jaxtl.training.freeze import freeze


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
        freeze=freeze("block_1", "block_11"),
        optim=Optim(name="adam", learning_rate=1e-4),
        train=Train(epochs=4, batch_size=64),
        reported=(("accuracy", 0.967), ("loss", 0.118), ("train_loss", 0.053), ("trainable_parameters", 9_630_426)),
    )
