"""Where metrics go besides `metrics.jsonl`: wandb and TensorBoard, each only if it is installed and configured."""

import importlib.util
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from yaongi.files import read_json, write_atomically
from yaongi.train.run_folder import TENSORBOARD, WANDB_ID

_CONNECT_SECONDS = 5


class Sink(Protocol):
    """A destination for numbers by name."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` after `step` steps."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoard:
    """A TensorBoard writer of event files in `OUT/tensorboard`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` after `step` steps."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()


class Wandb:
    """The wandb run of an output folder, continued after a resume; offline without a key or a connection."""

    def __init__(
        self, folder: Path, mode: str, project: str, config: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        import wandb

        online = mode == "online" or (mode == "auto" and bool(os.environ.get("WANDB_API_KEY")))
        if mode == "auto" and not online:
            say("wandb: no WANDB_API_KEY, so this run is logged offline (wandb sync sends it later)")
        elif online and not _reachable(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
            say("wandb: no connection, so this run is logged offline (wandb sync sends it later)")
            online = False
        self._run = wandb.init(
            mode="online" if online else "offline",
            resume="allow" if online else None,
            project=project,
            id=_run_id(folder),
            dir=str(folder),
            config=config,
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` after `step` steps."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()


def open_sinks(
    folder: Path,
    *,
    wandb: str,
    project: str,
    tensorboard: bool,
    config: dict[str, Any],
    first_step: int,
    say: Callable[[str], None],
) -> list[Sink]:
    """Open the configured sinks; one that isn't installed is left out, and a message says so."""
    sinks: list[Sink] = []
    for name, wanted in (("wandb", wandb != "off"), ("tensorboard", tensorboard)):
        if not wanted:
            continue
        if importlib.util.find_spec(name) is None:
            say(f"{name} is not installed: metrics go to metrics.jsonl without it")
        elif name == "wandb":
            sinks.append(Wandb(folder, wandb, project, config, say))
        else:
            sinks.append(TensorBoard(folder, first_step))
    return sinks


def _reachable(url: str) -> bool:
    """Return whether the server at `url` accepts connections."""
    address = urlsplit(url)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _run_id(folder: Path) -> str:
    path = folder / WANDB_ID
    if path.is_file():
        return str(read_json(path)["id"])
    new = secrets.token_hex(4)
    write_atomically(path, json.dumps({"id": new}).encode())
    return new
