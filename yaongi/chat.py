"""`python -m yaongi.chat FOLDER`: a conversation with a trained model in the terminal."""

import contextlib
import json
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from yaongi import cli

HELP = """/reset      begin anew
/save FILE  add the conversation to FILE, as a line of JSON that training can read
/help       show this
Ctrl-C ends an answer, Ctrl-D the program."""
Message = dict[str, str]
Stream = Callable[[list[int]], Iterator[str]]  # the pieces of the answer to a prompt's ids


@dataclass(frozen=True)
class Chat:
    """Talk to a model. Answers come as they are made; /help lists what else can be typed."""

    folder: tyro.conf.Positional[Path]  # model folder, run (its newest checkpoint) or checkpoint
    system: str = ""  # text that comes before the conversation and says how to answer
    max_new_tokens: int = 512  # most tokens of an answer; at most half of what the model can read
    temperature: float = 0.8  # sampling temperature; 0: always take the likeliest token
    top_k: int | None = None  # sample among the k likeliest tokens; None: no such limit
    top_p: float | None = 0.95  # sample among the likeliest tokens that together have this probability; None: all
    repetition_penalty: float = 1.0  # above 1: tokens that were there already become less likely
    seed: int | None = None  # seed of the sampling; None: another one every time
    device: str = "auto"  # auto (a GPU where there is one), cpu, gpu, cuda or cuda:N
    cuda_graph: bool = True  # on a GPU, record a step as a CUDA graph and replay it

    def run(self) -> None:
        """Load the model and talk until the end of input. Raises ValueError or OSError with a message of one line."""
        from yaongi.data.chats.encode import encode_prompt
        from yaongi.data.pieces import END_OF_TURN
        from yaongi.model.devices import device_of
        from yaongi.model.generation import stream_text
        from yaongi.model.sampling import Sampling
        from yaongi.pretrained import load_pretrained

        device = device_of(self.device, "chat")
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        if self.max_new_tokens < 1:
            raise ValueError(f"chat: max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        model, tokenizer = load_pretrained(self.folder, device, "chat")
        ends, end_of_turn = model.config.answer_ends, tokenizer.piece_to_id(END_OF_TURN)
        if end_of_turn not in ends:
            _note(f"warning: the model is not tuned for chats: {END_OF_TURN} is not among the ends of its answers")
        limit = model.config.max_sequence_length
        most = min(self.max_new_tokens, max(1, limit // 2))
        seed = secrets.randbits(63) if self.seed is None else self.seed

        def stream(ids: list[int]) -> Iterator[str]:
            pieces = stream_text(
                model,
                [ids],
                sampling,
                tokenizer.decode,
                stop=[*ends, end_of_turn],
                max_new_tokens=most,
                seed=seed,
                cuda_graph=self.cuda_graph,
            )
            return (text for _, text in pieces)

        talk = Talk(self.system, lambda messages: encode_prompt(messages, tokenizer), stream, limit - most)
        _note("/help lists what can be typed besides a message")
        for line in _lines():
            _follow(talk, line)


class Talk:
    """A conversation: its messages, and how the next answer comes."""

    def __init__(self, system: str, encode: Callable[[list[Message]], list[int]], stream: Stream, room: int) -> None:
        """Begin one.

        Args:
            encode: gives the prompt's ids of messages.
            stream: gives the answer to a prompt.
            room: tokens that a prompt may have.
        """
        self._system = [{"role": "system", "content": system}] if system.strip() else []
        self._encode, self._stream, self._room = encode, stream, room
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """All that has been said, the system's text first."""
        return [*self._system, *self.turns]

    def ask(self, text: str) -> None:
        """Print the answer to a message as it comes, and keep both. Ctrl-C ends it there.

        Raises:
            ValueError: the message is too long, or no text; the conversation is as before.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = self._encode([*self._system, *turns])
        forgotten = 0
        while len(ids) > self._room:
            if len(turns) == 1:
                raise ValueError(f"chat: a message must be at most {self._room} tokens long, got {len(ids)}")
            forgotten += 2
            turns = turns[2:]
            ids = self._encode([*self._system, *turns])
        if forgotten:
            _note(f"the conversation is too long: its first {forgotten} messages are forgotten")
        answer = ""
        with _interruptible() as interrupted:
            with contextlib.suppress(KeyboardInterrupt):
                for piece in self._stream(ids):
                    answer += piece
                    print(piece, end="", flush=True)
                    if interrupted():
                        break
            if interrupted():
                _note(" (stopped)")
        if interrupted() and not answer:
            return
        print()
        self.turns = [*turns, {"role": "assistant", "content": answer}]


def _follow(talk: Talk, line: str) -> None:
    """Do what a line says; a mistake is one line."""
    command, _, argument = line.strip().partition(" ")
    try:
        if command == "/help":
            _note(HELP)
        elif command == "/reset":
            talk.turns = []
            _note("a new conversation")
        elif command == "/save":
            _save(talk.messages, argument.strip())
        elif command.startswith("/"):
            raise ValueError(f"chat: commands must be /reset, /save or /help, got {command[:40]}")
        elif line.strip():
            talk.ask(line)
    except (ValueError, OSError) as error:
        _note(f"error: {cli.one_line(error)}")


def _save(messages: list[Message], file: str) -> None:
    """Add a conversation to a file, as a line."""
    if not file:
        raise ValueError("chat: /save must be followed by a file, got none")
    if not messages:
        raise ValueError("chat: a conversation must have a message to be saved, got none")
    with Path(file).expanduser().open("a", encoding="utf-8") as out:
        out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    _note(f"saved in {file}")


def _lines() -> Iterator[str]:
    """Yield what is typed until the end of input; Ctrl-C drops a line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` editing and a history
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError as error:
            _note(f"error: chat: what is typed must be UTF-8, got {error.reason}")
        except EOFError:
            print()
            return


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Note a first Ctrl-C, which the function that is given tells; a second one raises KeyboardInterrupt as usual.

    So a step of the model is never torn, and no Ctrl-C is lost where Python would ignore an exception.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    """Print what is not an answer."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command; an error is one line."""
    cli.run(tyro.cli(Chat, prog="python -m yaongi.chat").run)


if __name__ == "__main__":
    main()
