"""COVID-Twitter-BERT v2 with a bidirectional GRU on COVID-19 tweets, real or fake: the backbone is frozen.

The study names no rates. The backbone runs once for each tweet, so that a pass costs next to nothing and the head can
learn for as long as it pays: 20 passes at a rate of 2e-3 that decays to zero.

Without access to that checkpoint, make one of your own: `--experiment=bert_mlm_covid`, then
`--set model.weights=runs/bert_mlm_covid`.

Command: python -m jaxtl.main --experiment=ctbert_bigru_covid_feature

Expected: accuracy 0.91, loss 0.21, F1 of the real tweets 0.92 on the 2,140 test tweets (reported by the study).
"""

from jaxtl.config import Experiment, Head, Model, Optim, Text, Train
from jaxtl.training.freeze import train_head_only


def experiment() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        model=Model(
            preset="from_weights",
            weights="digitalepidemiologylab/covid-twitter-bert-v2",
            head=Head(kind="bigru", reads="sequence", hidden=128, dropout=0.1),
        ),
        data=Text(name="covid_fake_news", text_column="tweet", label_column="label"),
        freeze=train_head_only(),
        optim=Optim(name="adamw", learning_rate=2e-3, schedule="cosine", warmup=0.05, weight_decay=0.01, clip_norm=1.0),
        train=Train(epochs=20, batch_size=32, eval_batch_size=64, select="best"),
        reported=(
            ("accuracy", 0.91),
            ("loss", 0.21),
            ("f1/real", 0.92),
            ("confusion/fake/fake", 893),
            ("confusion/fake/real", 127),
            ("confusion/real/fake", 63),
            ("confusion/real/real", 1057),
        ),
    )
