"""`python -m yaongi.export FOLDER --out DIR --gguf FILE --push-to OWNER/NAME`: a model for other tools and the hub."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from yaongi import cli

if TYPE_CHECKING:
    from yaongi.data.tokenizer import Tokenizer
    from yaongi.model import Yaongi
    from yaongi.model.hub.gguf_file import Vocabulary


@dataclass(frozen=True)
class Export:
    """Convert a model to nemotron_h, which transformers reads, or to a GGUF file for llama.cpp; push it to the hub."""

    folder: tyro.conf.Positional[Path]  # model folder, run (its newest checkpoint) or checkpoint
    out: Path | None = None  # folder to write in nemotron_h; must not be the model folder
    gguf: Path | None = None  # file to write for llama.cpp
    push_to: str | None = None  # OWNER/NAME on the Hugging Face hub: push --out, or without it the model as it is
    private: bool = True  # whether a repository that --push-to makes is private
    revision: str = "main"  # branch to push to, such as step-1200 for a checkpoint
    drop_engram: bool = False  # leave out the Engrams, which neither can hold; without this they are an error
    measure: Path | None = None  # folder of tokens: before the Engrams are dropped, print what that costs on its text
    measure_rows: int = 16  # held-out rows per domain to measure on
    device: str = "auto"  # where to measure: auto (a GPU where there is one), cpu, gpu, cuda or cuda:N

    def run(self) -> None:
        """Measure, if asked, then write. Raises ValueError or OSError with a message of one line."""
        from yaongi.model import Yaongi
        from yaongi.model.hub.checkpoint_folders import (
            CHECKPOINTS,
            find_weights,
            run_of,
            said_weights,
            tokenizer_folder,
        )
        from yaongi.model.hub.folder import export_nemotron_h, lost_without_engram
        from yaongi.model.hub.push import open_repository
        from yaongi.model.hub.run_card import add_run

        if self.out is None and self.gguf is None and self.push_to is None:
            raise ValueError("export: --out, --gguf or --push-to must be given, got none")
        if self.out is not None and (self.out.resolve() == self.folder.resolve() or (self.out / CHECKPOINTS).is_dir()):
            raise ValueError(f"export: --out must be another folder than the model's or a run's, got {self.out}")
        folder = find_weights(self.folder)
        if self.push_to is not None:
            open_repository(self.push_to, self.private)
        model = Yaongi.from_pretrained(folder, dtype=None)
        print(said_weights(self.folder, folder), end="")
        lost = lost_without_engram(model.config, model.count_parameters())
        if self.measure is not None:
            self._print_cost(model, self.measure, tokenizer_folder(folder), lost)
        elif lost and self.drop_engram:
            print(f"leaving out {lost}; --measure TOKENS prints what that costs")
        if self.out is not None:
            export_nemotron_h(model, model.config, model.count_parameters(), self.out, drop_engram=self.drop_engram)
            save_tokenizer(model, folder, self.out)
            add_run(self.out, *run_of(folder))
            print(f"wrote {self.out}")
        if self.gguf is not None:
            self._write_gguf(model, self.gguf, tokenizer_folder(folder))
            print(f"wrote {self.gguf}")
        if self.push_to is not None:
            self._push(model, folder, self.push_to)

    def _push(self, model: "Yaongi", folder: Path, name: str) -> None:
        """Push what was exported, or else the model folder; of a checkpoint a model folder is made for it."""
        from yaongi.model.hub.checkpoint_folders import is_checkpoint, run_of
        from yaongi.model.hub.push import push_folder
        from yaongi.model.hub.run_card import add_run

        with tempfile.TemporaryDirectory() as made:
            pushed = self.out or folder
            if is_checkpoint(pushed):
                pushed = Path(made)
                model.save_pretrained(pushed)
                save_tokenizer(model, folder, pushed)
                add_run(pushed, *run_of(folder))
            print(f"pushed to {push_folder(pushed, name, f'Open-Yaongi: {self.folder}', self.revision)}")

    def _write_gguf(self, model: "Yaongi", file: Path, folder: Path) -> None:
        from yaongi.data.tokenizer import Tokenizer
        from yaongi.model.hub.gguf_file import write_gguf

        whole = without_engram(model) if self.drop_engram else model
        vocabulary = vocabulary_of(Tokenizer.of_model(folder))
        write_gguf(whole.state_dict(), whole.config, vocabulary, file, self.folder.resolve().name)

    def _print_cost(self, model: "Yaongi", tokens: Path, folder: Path, lost: str | None) -> None:
        """Print bits per byte with and without Engram, by domain."""
        import torch

        from yaongi.data.tokenizer import Tokenizer
        from yaongi.eval.held_out import held_out_bits, held_out_rows
        from yaongi.model.devices import device_of

        if lost is None:
            raise ValueError("export: --measure must be used with a model that has an Engram, got one without")
        device, length = device_of(self.device, "export"), model.config.max_sequence_length
        rows = held_out_rows(tokens, Tokenizer.of_model(folder).hash, length, self.measure_rows, warn=print)
        model = model.to(device)
        with torch.no_grad():
            costs = [held_out_bits(m, rows, device) for m in (model, without_engram(model))]
        counts = ", ".join(f"{domain} {len(part.input_ids)}" for domain, part in rows.items())
        print(f"bits per byte on held-out rows of {length} tokens ({counts}), with and without {lost}:")
        for domain in rows:
            before, after = (cost[domain] for cost in costs)
            print(f"  {domain:<8} {before:.3f} -> {after:.3f} ({after / before - 1:+.1%})")


def save_tokenizer(model: "Yaongi", source: Path, folder: Path) -> None:
    """Write the tokenizer of a model folder, or of a checkpoint, of a tuned model too, into another folder."""
    from yaongi.data.pieces import END_OF_TURN
    from yaongi.data.tokenizer import Tokenizer
    from yaongi.model.hub.checkpoint_folders import is_checkpoint, tokenizer_folder
    from yaongi.model.hub.folder import copy_tokenizer

    if is_checkpoint(source):
        tokenizer = Tokenizer.of_model(tokenizer_folder(source))
        tokenizer.save(folder, chat=tokenizer.piece_to_id(END_OF_TURN) in model.config.answer_ends)
    else:
        copy_tokenizer(source, folder)


def without_engram(model: "Yaongi") -> "Yaongi":
    """Return the model without its Engrams; both share their tensors."""
    from yaongi.model import Yaongi

    smaller = Yaongi(model.config.without_engram(), device="meta")
    kept = smaller.state_dict().keys()
    smaller.load_state_dict({name: t for name, t in model.state_dict().items() if name in kept}, assign=True)
    return smaller


def vocabulary_of(tokenizer: "Tokenizer") -> "Vocabulary":
    """Return what a GGUF file holds of a tokenizer."""
    from yaongi.data.chats.template import CHAT_TEMPLATE
    from yaongi.data.pieces import END_OF_TURN
    from yaongi.model.hub.gguf_file import Vocabulary

    return Vocabulary(
        tokenizer.pieces(), tokenizer.scores(), tokenizer.kinds(), CHAT_TEMPLATE, tokenizer.piece_to_id(END_OF_TURN)
    )


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(tyro.cli(Export, prog="python -m yaongi.export").run)


if __name__ == "__main__":
    main()
