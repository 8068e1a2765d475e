"""`python -m yaongi.generate FOLDER --prompt TEXT`: the continuation of each prompt by a trained model."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from yaongi import cli


@dataclass(frozen=True)
class Generate:
    """Print the continuation of each prompt."""

    folder: tyro.conf.Positional[Path]  # model folder that also holds tokenizer.model
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]]  # text to continue; repeat the option for a batch of prompts
    max_new_tokens: int = 128  # most tokens to generate per prompt
    temperature: float = 0.8  # sampling temperature; 0: always take the likeliest token
    top_k: int | None = None  # sample among the k likeliest tokens; None: no such limit
    top_p: float | None = 0.95  # sample among the likeliest tokens that together have this probability; None: all
    seed: int = 0  # seed of the sampling
    device: str = "auto"  # a torch device; auto: cuda where there is a GPU, else cpu

    def run(self) -> None:
        """Load model and tokenizer, generate, and print. Raises ValueError or OSError with a message of one line."""
        import torch

        from yaongi.data.tokenizer import Tokenizer
        from yaongi.model import Yaongi
        from yaongi.model.generation import generate

        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        tokenizer = Tokenizer.load(self.folder)
        model = Yaongi.from_pretrained(self.folder, dtype=dtype, device=device)
        if tokenizer.vocab_size != model.config.vocab_size:
            wanted = model.config.vocab_size
            raise ValueError(f"generate: tokenizer must have {wanted} pieces, got {tokenizer.vocab_size}")
        answers = generate(
            model,
            [tokenizer.encode(prompt) for prompt in self.prompt],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )
        for prompt, answer in zip(self.prompt, answers, strict=True):
            print(prompt + tokenizer.decode(answer))


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(tyro.cli(Generate, prog="python -m yaongi.generate").run)


if __name__ == "__main__":
    main()
