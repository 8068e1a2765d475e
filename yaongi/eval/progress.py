"""What an evaluation has done so far, on disk after each batch: after a kill nothing is computed twice."""

import json
from pathlib import Path
from typing import IO, Any

from yaongi.world import World


class Done:
    """Results by the hash of their batch. Every process reads the files of all, and appends to one of its own."""

    def __init__(self, folder: Path | None = None, name: str = "", world: World | None = None) -> None:
        """Read what is there.

        Args:
            folder: of the files, made if it is not there; None keeps nothing.
            name: of the files, that is what the results depend on besides the batch: the model, its dtype, its device.
        """
        self._found: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if folder is None or world is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob(f"{name}-*.jsonl")):
            self._read(path)
        world.barrier()  # nobody appends before all have read the same
        path = folder / f"{name}-{world.rank}.jsonl"
        _end_line(path)
        self._file = path.open("a", encoding="utf-8")

    def __contains__(self, digest: str) -> bool:
        """Return whether the batch was there at the start."""
        return digest in self._found

    def __getitem__(self, digest: str) -> Any:
        """Return the results of a batch that was there at the start."""
        return self._found[digest]

    def __len__(self) -> int:
        """Return the number of batches that were there at the start."""
        return len(self._found)

    def add(self, digest: str, results: Any) -> None:
        """Append the results of a batch, which JSON can hold."""
        if self._file is not None:
            self._file.write(json.dumps({"batch": digest, "results": results}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> None:
        """Read the whole lines of a file; one that a kill cut short is no JSON, and its batch is computed again."""
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            self._found[record["batch"]] = record["results"]


def _end_line(path: Path) -> None:
    """End the file's last line, if a kill cut it short, so that what is appended is a line of its own."""
    if path.is_file() and path.stat().st_size:
        with path.open("r+b") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
