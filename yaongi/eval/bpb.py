"""`python -m yaongi.eval bpb`: bits per byte of a model, by domain, on held-out rows or on texts of one's own."""

from dataclasses import dataclass
from pathlib import Path

import tyro

Texts = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class Bpb:
    """Print a model's bits per byte by domain: of held-out rows of a folder of tokens, of texts, or of both."""

    folder: tyro.conf.Positional[Path]  # model folder, run (its newest checkpoint) or checkpoint
    data: Path | None = None  # folder of token shards, whose held-out rows are read
    rows: int = 0  # held-out rows per domain, spread evenly over the split; 0: all
    text: Texts = ()  # [DOMAIN=]FILE, a UTF-8 text, read in NFC; without DOMAIN the file's name. Can be repeated
    row_tokens: int = 0  # tokens per row, whose first token nothing predicts; 0: as in training, else the longest
    by_position: bool = False  # also by position in the document, to see what a long context is worth
    device: str = "auto"  # auto (a GPU where there is one), cpu, gpu, cuda or cuda:N

    def run(self) -> None:
        """Load, measure and print. Raises ValueError or OSError with a message of one line."""
        import torch

        from yaongi.data.tokenizer import Tokenizer
        from yaongi.eval.held_out import held_out_bits, held_out_rows, text_rows
        from yaongi.eval.long_context.positions import by_position
        from yaongi.model import Yaongi
        from yaongi.model.devices import device_of
        from yaongi.model.hub.checkpoint_folders import find_weights, run_config, said_weights, tokenizer_folder
        from yaongi.model.hub.folder import read_config

        self._check()
        device = device_of(self.device, "bpb")
        texts = [_text(word) for word in self.text]
        folder = find_weights(self.folder)
        config, _ = read_config(folder)
        trained: int = run_config(folder).get("train", {}).get("row_tokens", 0)
        length = self.row_tokens or trained or config.max_sequence_length
        if not 2 <= length <= config.max_sequence_length:
            wanted = f"2 to the model's max_sequence_length, {config.max_sequence_length}"
            raise ValueError(f"bpb: --row-tokens must be {wanted}, got {length}")
        tokenizer = Tokenizer.of_model(tokenizer_folder(folder))
        parts = {}
        if self.data is not None:
            found = held_out_rows(self.data, tokenizer.hash, length, self.rows, warn=print)
            parts["held-out"] = found
        if texts:
            parts["text"] = text_rows(texts, tokenizer, length)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = Yaongi.from_pretrained(folder, dtype=dtype, device=device).eval()
        print(said_weights(self.folder, folder), end="")
        for what, rows in parts.items():
            print(f"bits per byte of {what} rows of {length} tokens")
            bits = held_out_bits(model, rows, device)
            for domain, value in bits.items():
                size = int(rows[domain].text_bytes.sum())
                print(f"  {domain:<12} {value:.4f}   {len(rows[domain].input_ids):>7,} rows {size:>13,} bytes")
            if self.by_position:
                for domain, part in rows.items():
                    there = held_out_bits(model, by_position(part, torch.from_numpy(tokenizer.byte_lengths)), device)
                    said = ", ".join(f"{where} {value:.4f}" for where, value in there.items())
                    print(f"  {domain} by position: {said}")
            if len(bits) > 1:
                print(f"  {'mean':<12} {sum(bits.values()) / len(bits):.4f}")

    def _check(self) -> None:
        if self.data is None and not self.text:
            raise ValueError("bpb: --data or --text must be given, got neither")
        if self.rows < 0:
            raise ValueError(f"bpb: --rows must be 0 or more, got {self.rows}")


def _text(word: str) -> tuple[str, str]:
    """Return the domain and the text of [DOMAIN=]FILE."""
    domain, _, name = word.rpartition("=")
    file = Path(word if Path(word).is_file() else name)
    try:
        content = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"bpb: --text must be UTF-8, got {file} with {error.reason}") from error
    if not content:
        raise ValueError(f"bpb: --text must be a file with text, got the empty {file}")
    return domain if file != Path(word) and domain else file.stem, content
