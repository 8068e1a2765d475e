"""`python -m yaongi.train` where a step, a save or an evaluation takes two seconds, and says when it begins."""

import os
import sys
import time
from typing import Any

from yaongi.train.__main__ import main
from yaongi.train.checkpoint.hashes import HashingWriter
from yaongi.train.evaluation.held_out import HeldOutBits
from yaongi.train.step.stepper import Stepper

PARTS = {"step": (Stepper, "__call__"), "save": (HashingWriter, "finish"), "evaluation": (HeldOutBits, "bits_per_byte")}
owner, name = PARTS[os.environ["SLOW"]]
original: Any = getattr(owner, name)
calls = 0


def slow(*args: Any, **options: Any) -> Any:
    global calls
    calls += 1
    if calls == 2:  # the first evaluation comes before the first step
        print("now", flush=True)
        time.sleep(2)
    return original(*args, **options)


setattr(owner, name, slow)
sys.argv[0] = "yaongi.train"
main()
