"""`yaongi COMMAND …`, or `python -m yaongi COMMAND …`: the package's commands behind one name."""

import runpy
import sys

import yaongi
from yaongi import cli

COMMANDS = {  # name: the module that `python -m` would run, and what it does
    "data": ("yaongi.data", "download text, train a tokenizer, write and inspect token shards"),
    "train": ("yaongi.train", "pretrain a model, or go on with a run"),
    "tune": ("yaongi.tune", "tune a model on conversations"),
    "report": ("yaongi.train.report", "one page on a run, or on several beside each other"),
    "generate": ("yaongi.generate", "text from a trained model"),
    "chat": ("yaongi.chat", "a conversation with a trained model"),
    "serve": ("yaongi.serve", "a trained model behind OpenAI's protocol, with a page to talk to it"),
    "eval": ("yaongi.eval", "bits per byte, scores on tasks, and a page that shows them"),
    "export": ("yaongi.export", "a model for transformers or llama.cpp"),
    "model": ("yaongi.model", "count a preset's parameters and FLOPs"),
    "kernels": ("yaongi.kernels", "which kernels this machine can run"),
}


def usage() -> str:
    """What `yaongi --help` prints."""
    rows = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: yaongi COMMAND [options]", "", *rows, "", "`yaongi COMMAND --help` lists its options."])


def main() -> None:
    """Run the command that the first argument names, as `python -m` would run its module; a mistake is one line."""
    cli.run(_run)


def _run() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(yaongi.__version__)
    elif name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    else:
        raise ValueError(f"yaongi: command must be one of {', '.join(COMMANDS)}, got {name!r}")


if __name__ == "__main__":
    main()
