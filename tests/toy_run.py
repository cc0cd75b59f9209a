"""fsmde_jax.main with a toy encoder, which compiles at once: python -m tests.toy_run <flags of fsmde_jax.main>.

TOY_EVALUATION, seconds: every batch of an evaluation takes so long.
TOY_LATE: the number of a process whose writing of a checkpoint ends only when a best one is begun (in 300 s).
"""

import os
import sys
import threading
import time

import jax
import orbax.checkpoint as ocp
from absl import app

from fsmde_jax import evaluate, main, run_checkpoints
from fsmde_jax.models import student
from tests import toy_encoder


def toy() -> None:
    """Puts the toys in place of what they stand for."""
    student.make_encoder = toy_encoder.make_encoder
    jax.config.update("jax_disable_most_optimizations", True)
    predict, seconds = evaluate._predict, float(os.environ.get("TOY_EVALUATION", "0"))

    def slowly(*arguments):
        time.sleep(seconds)
        return predict(*arguments)

    evaluate._predict = slowly
    if late := os.environ.get("TOY_LATE"):
        end_late(int(late))


def end_late(process: int) -> None:
    """The background's last part of a write, in one process, meets the begin of a best checkpoint in the other."""
    save_best, finalize, begun = (
        run_checkpoints.Checkpoints.save_best,
        ocp.CheckpointManager._finalize,
        threading.Event(),
    )

    def save(*arguments):
        begun.set()
        return save_best(*arguments)

    def end(manager, *arguments):
        if jax.process_index() == process and manager.directory.name == "checkpoints":
            if not begun.wait(300):
                raise RuntimeError("no best checkpoint was begun: nothing met")
            time.sleep(2)
        return finalize(manager, *arguments)

    run_checkpoints.Checkpoints.save_best, ocp.CheckpointManager._finalize = save, end


if __name__ == "__main__":
    toy()
    sys.exit(app.run(main.main, flags_parser=main._parse))
