"""The starting point for images of your own: DINOv2-small, last block, final norm and head learn.

The images lie in one folder a class, `DIR/train/CLASS/*.jpg` and `DIR/val/CLASS/*.jpg`, or `DIR/CLASS/*.jpg`: then a
fifth of them, drawn by class, is held out. Try `--set 'freeze=train_head_only()'` for a few dozen images, `--set
data.augment=crop_flip --set 'freeze=train_all()' --set optim.learning_rate=1e-5` for many thousands.

Command: python -m jaxtl.main --experiment=image_folder --set data.dir=DIR

Expected: depends on the images; the figure to beat is `--set 'freeze=train_head_only()'`.
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
        data=Images(source="folder", dir="images", resize="crop", scale="imagenet"),
        freeze=train_from("block_12"),
        optim=Optim(name="adam", learning_rate=1e-4),
        train=Train(epochs=10, batch_size=64),
    )
