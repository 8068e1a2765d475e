"""`python -m yaongi.export FOLDER --out DIR`: a model folder in the layout that Hugging Face's tools read."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from yaongi import cli

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Export:
    """Convert a model folder to nemotron_h, the layout that transformers, vLLM and llama.cpp read."""

    folder: tyro.conf.Positional[Path]  # model folder, written by the trainer or by save_pretrained
    out: Path  # folder to write; must not be the model folder
    drop_engram: bool = False  # leave out the Engrams, which the layout can't hold; without this they are an error

    def run(self) -> None:
        """Write config, weights, generation config, model card and tokenizer. Raises ValueError or OSError."""
        from yaongi.model import Yaongi
        from yaongi.model.hub.folder import export_nemotron_h

        if self.out.resolve() == self.folder.resolve():
            raise ValueError(f"export: --out must be another folder than the model's, got {self.out}")
        model = Yaongi.from_pretrained(self.folder, dtype=None)
        export_nemotron_h(model, model.config, model.count_parameters(), self.out, drop_engram=self.drop_engram)
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, self.out / name)
        print(f"wrote {self.out}")


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(tyro.cli(Export, prog="python -m yaongi.export").run)


if __name__ == "__main__":
    main()
