"""The starting point for texts of your own: BERT with a dense layer on [CLS], everything learns.

A CSV, JSON lines or Parquet file with a column of texts and one of labels (any strings), named by `data.text_column`
and `data.label_column`. Without `data.validation` a fifth of the texts, drawn by class, is held out; `data.test` is
looked at once, at the end. A slow machine, or a few hundred texts: train only the head, as `bert_bigru_covid_feature`
does; copy that file.

Command: python -m jaxtl.main --experiment=text_csv --set data.train=FILE.csv

Expected: depends on the texts.
"""

from jaxtl.config import Experiment, Head, Model, Optim, Text, Train


def experiment() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        model=Model(
            preset="from_weights",
            weights="google-bert/bert-base-uncased",
            head=Head(kind="fc", reads="cls", dropout=0.1),
        ),
        data=Text(text_column="text", label_column="label"),
        freeze=(("head..", "head"), (".*", "backbone")),
        optim=Optim(
            name="adamw",
            learning_rate=1e-4,
            width=768,
            schedule="linear",
            warmup=0.1,
            weight_decay=0.01,
            clip_norm=1.0,
            multipliers=(("head", 10.0),),
        ),
        train=Train(epochs=3, batch_size=32, eval_batch_size=64, select="best"),
    )
