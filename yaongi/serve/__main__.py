"""`python -m yaongi.serve FOLDER`: a trained model behind OpenAI's protocol, with a page to talk to it."""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from yaongi import cli

KEY = "YAONGI_API_KEY"


@dataclass(frozen=True)
class Serve:
    """Answer requests in OpenAI's protocol, and show a page to talk to the model. Ctrl-C lets running answers end.

    With YAONGI_API_KEY in the environment, every request must bear that key.
    """

    folder: tyro.conf.Positional[Path]  # model folder, run (its newest checkpoint) or checkpoint
    host: str = "127.0.0.1"  # address to listen at: this machine alone; 0.0.0.0: every machine that reaches this one
    port: int = 8000  # port to listen at; 0: any that is free
    name: str | None = None  # the model's name in the protocol; None: that of the folder
    slots: int = 0  # answers at once; 0: 64 on a GPU, 8 on a CPU
    max_sequence_length: int = 0  # tokens of prompt and answer together; 0: the model's own limit
    chunk: int = 0  # tokens of prompts that are read between two steps of the answers; 0: 4,096 on a GPU, 512 on a CPU
    queue: int = 256  # answers that may wait for a slot; more are refused (503)
    grace: int = 30  # seconds that running answers have to end at a stop
    device: str = "auto"  # auto (a GPU where there is one), cpu, gpu, cuda or cuda:N
    cuda_graph: bool = True  # on a GPU, record steps and the reading of prompts as CUDA graphs and replay them

    def run(self) -> int:
        """Load the model, print the plan, and serve until a signal. Errors are those of `serve`, one line each."""
        for package in ("starlette", "uvicorn"):
            cli.require(package)
        from yaongi.serve.server import Options, serve

        options = Options(**{field: getattr(self, field) for field in Options.__dataclass_fields__})
        return serve(self.folder, options, os.environ.get(KEY) or None)


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(tyro.cli(Serve, prog="python -m yaongi.serve").run)


if __name__ == "__main__":
    main()
