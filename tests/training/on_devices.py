"""Trains experiments on virtual devices, as many as the process begins with: `python on_devices.py JOBS.json`.

JOBS.json holds [elements from which on a parameter is divided, [[path of experiment.json, run folder], ..]]. Beside a
run folder, in FOLDER.programs, is the text of all programs that were compiled for it, and in FOLDER.sizes.json the
elements of every array of the training state: of all of it, and of the part on one device.
"""

import json
import sys
from pathlib import Path

import jax

from jaxtl import config
from jaxtl.training import loop, sharding


def main(jobs: Path) -> None:
    """Trains, job by job."""
    programs, sizes = [], []
    compile_program, prepare = jax.stages.Lowered.compile, loop._prepare

    def compile_and_note(self, *args, **kwargs):
        compiled = compile_program(self, *args, **kwargs)
        programs.append(compiled.as_text())
        return compiled

    def prepare_and_note(*args):
        ready = prepare(*args)
        sizes[:] = [[x.size, x.addressable_shards[0].data.size] for x in jax.tree.leaves(ready.state)]
        return ready

    jax.stages.Lowered.compile, loop._prepare = compile_and_note, prepare_and_note
    loop.account.write = lambda *_: []  # no report
    sharding.DIVIDED_FROM, experiments = json.loads(jobs.read_text())
    for experiment, folder in experiments:
        programs.clear()
        loop.train(config.from_json(Path(experiment).read_text(), experiment), Path(folder))
        Path(f"{folder}.programs").write_text("\n".join(programs))
        Path(f"{folder}.sizes.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
