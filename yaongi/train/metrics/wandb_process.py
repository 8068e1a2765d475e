"""The program that talks to wandb, in a process of its own, so that nothing there can hold training up.

Standard input is a line of JSON with what `wandb.init` needs, then lines with a step and `values`, `loads` or
`samples`; its end ends the program, once the run's report has been sent if there is one. Standard output is lines for
the user, which `sinks.py` prints; with `!` in front they say why this program ends.
"""

import json
import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from yaongi.files import read_json, write_json
from yaongi.train.run_folder import WANDB_ID

_CONNECT_SECONDS = 5
_INIT_SECONDS = 15  # for a server that accepts connections and says nothing
_FINISH_SECONDS = 40  # after the last line, to send what is left
_LATER = "(wandb sync sends it later)"


def main() -> None:
    """Log what comes; the whole session of processes ends within `_FINISH_SECONDS` of the last line."""
    lines = iter(sys.stdin.readline, "")
    start = json.loads(next(lines))
    run = _start(start)
    samples = wandb.Table(["step", "sample", "text"], log_mode="INCREMENTAL")
    for line in lines:
        record = json.loads(line)
        run.log(_values(record, samples), step=record["step"])
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(_FINISH_SECONDS)
    if Path(start["report"]).is_file():
        run.log({"report": wandb.Html(Path(start["report"]), inject=False)})
    run.finish()


def _values(record: dict[str, Any], samples: Any) -> dict[str, Any]:
    """Return what wandb is to log of a line; rows of samples are put into their table."""
    if "loads" in record:
        return {"expert_load": wandb.Histogram(record["loads"])}
    if "samples" in record:
        for name, text in record["samples"].items():
            samples.add_data(record["step"], name, text)
        return {"samples": samples}
    return record["values"]


def _start(start: dict[str, Any]) -> Any:
    """Begin or continue the run: online if asked and possible, else offline."""
    folder, mode = Path(start["folder"]), start["mode"]
    online = mode == "online"
    if online and not _reachable(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        _say(f"wandb: no connection, so this run is logged offline {_LATER}")
        online = False
    run_id = _run_id(folder)
    if online:
        try:
            return _init(start, run_id, "online")
        except Exception as error:  # wandb's errors have no common class below it
            _say(f"wandb: {_line(error)}; so this run is logged offline {_LATER}")
            wandb.teardown()
    return _init(start, run_id, "offline")


def _init(start: dict[str, Any], run_id: str, mode: Any) -> Any:
    return wandb.init(
        mode=mode,
        resume="allow" if mode == "online" else None,
        project=start["project"],
        name=start["name"],
        group=start["group"],
        tags=start["tags"],
        id=run_id,
        dir=start["folder"],
        config=start["config"],
        settings=wandb.Settings(silent=True, console="off", save_code=False, init_timeout=_INIT_SECONDS),
    )


def _give_up(*_: object) -> None:
    _say(f"!wandb: the server did not take everything within {_FINISH_SECONDS} s; metrics.jsonl has it")
    os.killpg(0, signal.SIGKILL)


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
    write_json(path, {"id": new})
    return new


def _say(text: str) -> None:
    print(text, file=_MESSAGES, flush=True)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


if __name__ == "__main__":
    _MESSAGES = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever wandb prints goes the way of its errors
    try:
        main()
    except Exception as error:
        _say(f"!wandb: {_line(error)}; the run goes on without it")
        os.killpg(0, signal.SIGKILL)
