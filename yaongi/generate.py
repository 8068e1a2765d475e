"""`python -m yaongi.generate FOLDER --prompt TEXT`: the continuation of each prompt by a trained model."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

from yaongi import cli

STANDARD_INPUT = Path("-")


@dataclass(frozen=True)
class Generate:
    """Print the continuation of each prompt. That of a single prompt is printed as it comes."""

    folder: tyro.conf.Positional[Path]  # model folder, run (its newest checkpoint) or checkpoint
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # text to continue; repeat the option for a batch
    prompt_file: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()  # file with a text to continue; -: standard input
    max_new_tokens: int = 128  # most tokens to generate per prompt
    temperature: float = 0.8  # sampling temperature; 0: always take the likeliest token
    top_k: int | None = None  # sample among the k likeliest tokens; None: no such limit
    top_p: float | None = 0.95  # sample among the likeliest tokens that together have this probability; None: all
    repetition_penalty: float = 1.0  # above 1: tokens that were there already become less likely
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # text that ends an answer; repeat the option for several
    seed: int = 0  # seed of the sampling; with the same prompt it gives the same answer in any batch
    device: str = "auto"  # auto (a GPU where there is one), cpu, gpu, cuda or cuda:N
    cuda_graph: bool = True  # on a GPU, record a step as a CUDA graph and replay it

    def run(self) -> None:
        """Load model and tokenizer, generate, and print. Raises ValueError or OSError with a message of one line."""
        from yaongi.model.devices import device_of
        from yaongi.model.generation import stream_text
        from yaongi.model.sampling import Sampling
        from yaongi.pretrained import load_pretrained

        device = device_of(self.device, "generate")
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        prompts = self._prompts()
        model, tokenizer = load_pretrained(self.folder, device, "generate")
        pieces = stream_text(
            model,
            [tokenizer.encode(prompt) for prompt in prompts],
            sampling,
            tokenizer.decode,
            stop_strings=self.stop,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            cuda_graph=self.cuda_graph,
        )
        _print(prompts, pieces)

    def _prompts(self) -> list[str]:
        """Return the prompts of the options, then those of the files."""
        prompts = [*self.prompt, *map(_read, self.prompt_file)]
        if not prompts:
            raise ValueError("generate: --prompt or --prompt-file must be given, got neither")
        return prompts


def _read(file: Path) -> str:
    """Return the text of a file, or of standard input, without the line break that ends it."""
    content = sys.stdin.buffer.read() if file == STANDARD_INPUT else file.read_bytes()
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"generate: prompt file must be UTF-8, got {file} with {error.reason}") from error


def _print(prompts: list[str], pieces: Iterable[tuple[int, str]]) -> None:
    """Print each prompt with its continuation: a single one as it comes, several one after the other."""
    if len(prompts) > 1:
        answers = list(prompts)
        for row, text in pieces:
            answers[row] += text
        print("\n".join(answers))
        return
    first = next(iter(pieces := iter(pieces)), None)  # a mistake shows before anything is printed
    print(prompts[0] + (first[1] if first else ""), end="", flush=True)
    for _, text in pieces:
        print(text, end="", flush=True)
    print()


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(tyro.cli(Generate, prog="python -m yaongi.generate").run)


if __name__ == "__main__":
    main()
