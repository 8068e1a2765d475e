"""`python -m yaongi.tune --init RUN/model --data CHAT --out TUNED`: tuning, on one device or under `torchrun`."""

import sys
from importlib import import_module

from yaongi import cli
from yaongi.tune.command_line import parse

if __name__ == "__main__":
    cli.show_help(parse)
    job = import_module("yaongi.tune.objectives").job_of(sys.argv[1:])
    import_module("yaongi.train.program").main(job)
