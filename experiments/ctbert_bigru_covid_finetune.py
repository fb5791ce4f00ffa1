"""COVID-Twitter-BERT v2 with a bidirectional GRU on COVID-19 tweets, real or fake: everything learns.

The study names no rates. A BERT of width 1024 diverges at the rates that suit a smaller one: 3e-5 with warm-up, linear
decay and clipping, over three passes; other widths in proportion (`optim.width`). CT-BERT's authors fine-tune at 2e-5
(Mueller et al. 2020, arXiv:2005.07503). The new head starts from nothing and learns ten times as fast.

Without access to that checkpoint, make one of your own: `--experiment=bert_mlm_covid`, then
`--set model.weights=runs/bert_mlm_covid`.

Command: python -m jaxtl.main --experiment=ctbert_bigru_covid_finetune

Expected: accuracy 0.97, loss 0.14, F1 of the real tweets 0.98 on the 2,140 test tweets (reported by the study).
"""

from jaxtl.config import Experiment, Head, Model, Optim, Text, Train


def experiment() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        model=Model(
            preset="from_weights",
            weights="digitalepidemiologylab/covid-twitter-bert-v2",
            head=Head(kind="bigru", reads="sequence", hidden=128, dropout=0.1),
        ),
        data=Text(name="covid_fake_news", text_column="tweet", label_column="label"),
        freeze=(("head..", "head"), (".*", "backbone")),
        optim=Optim(
            name="adamw",
            learning_rate=3e-5,
            width=1024,
            schedule="linear",
            warmup=0.1,
            weight_decay=0.01,
            clip_norm=1.0,
            multipliers=(("head", 10.0),),
        ),
        train=Train(epochs=3, batch_size=32, eval_batch_size=64, select="best"),
        reported=(
            ("accuracy", 0.97),
            ("loss", 0.14),
            ("f1/real", 0.98),
            ("confusion/fake/fake", 975),
            ("confusion/fake/real", 45),
            ("confusion/real/fake", 12),
            ("confusion/real/real", 1108),
        ),
    )
