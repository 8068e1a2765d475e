"""`python -m yaongi.tune --init RUN/model --data CHAT --out TUNED`: tuning, on one device or under `torchrun`."""

import sys

from yaongi.train.program import main
from yaongi.tune.objectives import job_of

if __name__ == "__main__":
    main(job_of(sys.argv[1:]))
