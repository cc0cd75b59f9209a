"""fsmde_jax.main with a toy encoder, which compiles at once: python -m tests.toy_run <flags of fsmde_jax.main>.

TOY_EVALUATION, seconds: every batch of an evaluation takes so long.
"""

import os
import sys
import time

import jax
from absl import app

from fsmde_jax import evaluate, main
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


if __name__ == "__main__":
    toy()
    sys.exit(app.run(main.main, flags_parser=main._parse))
