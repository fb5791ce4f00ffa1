"""Writes a finished run as a folder that others can use without jaxtl.

    python -m jaxtl.export runs/text_csv exported/tweets
    python -m jaxtl.export runs/text_csv exported/tweets_jax --format=stablehlo

huggingface   config.json, model.safetensors, tokenizer or image processor, model card: what transformers loads with
              from_pretrained, in torch. A head that transformers does not have lies beside the backbone, with the few
              lines of torch that put it on.
stablehlo     one file of jax.export, parameters inside, for CPU, CUDA and TPU and any batch size, and signature.json.
              Needs jax alone.

Each folder's README.md says how it is loaded. The run may be on gs://, the folder to write is a local one.
"""

import sys
from pathlib import Path

from absl import app, flags

from jaxtl.cli import guarded, parser, quiet_libraries
from jaxtl.errors import UserError

_FORMAT = flags.DEFINE_enum("format", "huggingface", ["huggingface", "stablehlo"], "What to write, see above.")
# See jaxtl.compare.
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Move an existing folder aside.", allow_override=True)


def run(argv: list[str]) -> None:
    """Does what the command line says; raises UserError for what the user can mend."""
    if len(argv) != 3:
        raise UserError("give a run folder and the folder to write, as in `runs/text_csv exported/tweets`")
    from jaxtl import remote

    if remote.url(argv[2]):
        raise UserError(f"{argv[2]}: give a local folder to write, and copy it from there")
    folder, target = remote.local(argv[1], without=["checkpoints"]), Path(argv[2]).expanduser()
    if target.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"{target} is the run itself, or holds it: give another folder to write")
    # Slow imports come after the command line has been read.
    from jaxtl import storage
    from jaxtl.exporting import huggingface, stablehlo
    from jaxtl.training.network import load_run

    quiet_libraries()
    write = {"huggingface": huggingface.write, "stablehlo": stablehlo.write}[_FORMAT.value]
    with storage.folder_written_whole(target, overwrite=_OVERWRITE.value) as temporary:
        write(load_run(folder), temporary)
    print(target / "README.md")


def main(argv: list[str]) -> None:
    """Runs; see `jaxtl.cli`."""
    guarded(run, argv, "nothing was written")


if __name__ == "__main__":
    app.run(main, flags_parser=parser(sys.modules[__name__]))
