"""The study's six models of COVID-19 tweets, one after the other, compared with what it reports.

With other weights: `--set model.weights=DIR` for all, or for one
`--set ctbert_bigru_covid_finetune.model.weights=runs/bert_mlm_covid`.

Command: python -m jaxtl.main --suite=covid

Expected: accuracy 0.86, 0.92 and 0.91 with a frozen backbone, 0.95, 0.96 and 0.97 fine-tuned (reported by the study).
"""

from jaxtl.config import Suite
from jaxtl.experiments import load

MEMBERS = (
    "bert_covid_feature",
    "bert_bigru_covid_feature",
    "ctbert_bigru_covid_feature",
    "bert_covid_finetune",
    "bert_bigru_covid_finetune",
    "ctbert_bigru_covid_finetune",
)


def experiment() -> Suite:
    """Returns the suite."""
    return Suite(members=tuple((name, load(name)) for name in MEMBERS))
