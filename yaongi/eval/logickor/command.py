"""`python -m yaongi.eval logickor generate|judge`."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

JUDGE = "gpt-4-1106-preview"  # the protocol's


@dataclass(frozen=True)
class Generate:
    """Answer LogicKor's questions in its three modes, both turns. Works under torchrun too."""

    folder: tyro.conf.Positional[Path]  # model folder, run (its newest checkpoint) or checkpoint
    protocol: Path  # clone of LogicKor: questions, examples and prompts are read from it
    out: Path = Path("eval")  # folder to write: logickor/MODE.jsonl
    max_new_tokens: int = 1024  # most tokens of an answer
    device: str = "auto"  # auto (a GPU where there is one), cpu, gpu or cuda

    def run(self) -> None:
        """Generate and write. Raises ValueError or OSError with a message of one line."""
        from yaongi.data.pieces import END_OF_TURN
        from yaongi.eval.evaluate import Settings, load
        from yaongi.eval.logickor.answers import write_answers
        from yaongi.eval.logickor.protocol import read_protocol
        from yaongi.eval.processes import in_world
        from yaongi.world import World

        protocol = read_protocol(self.protocol)

        def generate(world: World) -> None:
            say = print if world.is_main else (lambda _: None)
            loaded = load(self.folder, Settings(self.out), world, say)
            answerer = loaded.answerer
            answerer.stop_pieces = (END_OF_TURN,)
            write_answers(self.out, protocol, answerer, loaded.description, self.max_new_tokens, say)
            if answerer.tally.cut:
                say(f"{answerer.tally.cut} prompts were too long and lost their beginning")

        in_world(self.device, generate)


@dataclass(frozen=True)
class Judge:
    """Have a model behind a URL score the answers; the key is read from OPENAI_API_KEY.

    Replies are kept as they come: run again, only what ended without a reply is asked for. Failures are named, kept
    apart from the means, and make the status 1.
    """

    out: tyro.conf.Positional[Path]  # folder with the answers; logickor.json and the page are written there
    protocol: Path  # clone of LogicKor
    url: str = "https://api.openai.com/v1"  # OpenAI-compatible endpoint, up to /v1
    judge: str = JUDGE  # name of the judging model; scores of different judges are on different scales
    at_once: int = 8  # questions to ask at once
    timeout: float = 120.0  # seconds to wait for a reply before it is asked for again

    def run(self) -> int:
        """Ask, print the means, write `logickor.json`, and return 1 if a judgement failed."""
        from yaongi.eval.logickor import judge as judging
        from yaongi.eval.logickor.answers import FOLDER, REPLIES, read_answers
        from yaongi.eval.logickor.marks import summarise
        from yaongi.eval.logickor.protocol import TURNS, read_protocol
        from yaongi.eval.report.page import LOGICKOR, write_page
        from yaongi.files import write_json

        if self.at_once < 1 or not self.timeout > 0:
            raise ValueError(f"logickor: --at-once and --timeout must be above 0, got {self.at_once}, {self.timeout}")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"logickor: --url must begin with http:// or https://, got {self.url}")
        protocol = read_protocol(self.protocol)
        model, modes = read_answers(self.out)
        questions = {question.id: question for question in protocol.questions}
        asked = [
            judging.Asked(mode, row["id"], turn, protocol.judge_messages(questions[row["id"]], row["outputs"], turn))
            for mode, rows in modes.items()
            for row in rows
            for turn in TURNS
        ]
        endpoint = judging.Judge(self.url, self.judge, os.environ.get("OPENAI_API_KEY", ""), self.timeout)
        replies = judging.ask_all(asked, endpoint, self.out / FOLDER / REPLIES, self.at_once, print)
        found: dict[str, Any] = {
            "version": 1,
            "model": model["name"],
            "weights": model["weights"],
            "judge": self.judge,
            "date": datetime.now(UTC).date().isoformat(),
            **summarise(replies, {question.id: question.category for question in protocol.questions}),
        }
        write_json(self.out / LOGICKOR, found)
        print_means(found)
        print(f"report: {write_page([self.out], self.out / 'report.html')}")
        return 1 if found["failures"] else 0


def print_means(found: dict[str, Any]) -> None:
    """Print the means of each mode, and the failures."""
    print(f"LogicKor by {found['judge']}, {found['date']}: scores of other judges are on another scale")
    print(f"{'mode':<12} {'single':>7} {'multi':>7} {'overall':>8} {'as published':>13} {'failed':>7}")
    for mode, entry in found["modes"].items():
        means = ["none" if entry[key] is None else f"{entry[key]:.2f}" for key in ("single", "multi", "overall")]
        published = f"{entry['as_published']:.2f}"
        print(f"{mode:<12} {means[0]:>7} {means[1]:>7} {means[2]:>8} {published:>13} {entry['failed']:>7}")
    for failure in found["failures"]:
        print(f"failed: {failure['mode']} {failure['id']} {failure['turn']}: {failure['why']}")


@dataclass(frozen=True)
class Logickor:
    """LogicKor: answers of a model, and a judge's scores."""

    command: Annotated[
        Annotated[Generate, tyro.conf.subcommand("generate", prefix_name=False)]
        | Annotated[Judge, tyro.conf.subcommand("judge", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int | None:
        """Run the subcommand."""
        return self.command.run()
