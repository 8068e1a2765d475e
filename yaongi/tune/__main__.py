"""`python -m yaongi.tune --init RUN/model --data CHAT --out TUNED`: tuning, on one device or under `torchrun`."""

from yaongi.train.program import main
from yaongi.tune.job import Tuning

if __name__ == "__main__":
    main(Tuning())
