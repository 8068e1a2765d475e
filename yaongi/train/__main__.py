"""`python -m yaongi.train --preset yaongi-tiny`: pretraining, on one device or under `torchrun`."""

from importlib import import_module

from yaongi import cli
from yaongi.train.command_line import parse

if __name__ == "__main__":
    cli.show_help(parse)
    import_module("yaongi.train.program").main()
