"""BERT goes on pretraining on COVID-19 tweets, by masked language modelling: makes a COVID-Twitter-BERT of one's own.

The texts are those of the training file; a tenth of them is held out to measure perplexity, and those of the validation
and test files are not seen. Any other texts: `--set data.name= --set data.train=FILE.txt` (or .csv, .jsonl, .parquet;
several, separated by commas). The other experiments start from the result: `--set model.weights=runs/bert_mlm_covid`.

Command: python -m jaxtl.main --experiment=bert_mlm_covid

Expected: a lower perplexity on held-out tweets than before; the experiments that start from it show what it is worth.
"""

from jaxtl.config import Experiment, Head, Model, Optim, Text, Train


def experiment() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        model=Model(
            preset="from_weights",
            weights="google-bert/bert-base-uncased",
            head=Head(kind="mlm", reads="masked"),
        ),
        data=Text(
            name="covid_fake_news",
            train=("Constraint_Train.csv",),
            text_column="tweet",
            label_column="",
            eval_fraction=0.1,
        ),
        optim=Optim(
            name="adamw", learning_rate=1e-4, width=768, schedule="linear", warmup=0.1, weight_decay=0.01, clip_norm=1.0
        ),
        train=Train(epochs=10, batch_size=32, eval_batch_size=64),
    )
