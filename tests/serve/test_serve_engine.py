"""The running batch: its answers are those of `generate`, whatever else it holds, however prompts are cut."""

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_support import ENGRAM, roughened, small_config

from yaongi.model import Yaongi, slots
from yaongi.model.generation import generate
from yaongi.model.sampling import Sampling
from yaongi.serve.engine import Engine, Limits, QueueFullError, Said
from yaongi.serve.rows import Piece, Request, Row

LIMITS = Limits(slots=3, capacity=64, chunk=8, queue=40)
GPU_SIZES = {"hidden_size": 128, "mamba_heads": 8, "mamba_head_dim": 16, "mamba_state": 16, "attention_head_dim": 32}


@pytest.fixture(scope="module")
def model() -> Yaongi:
    """Return a small model with an Engram."""
    return roughened(Yaongi(small_config(engram=[ENGRAM]), compression=[token // 2 for token in range(61)]))


class Collected:
    """An engine whose pieces are kept by row."""

    def __init__(self, model: Yaongi, limits: Limits = LIMITS, ends: tuple[int, ...] = (), **options: Any) -> None:
        self.pieces: dict[Row, list[Piece]] = defaultdict(list)
        self.engine = Engine(model, ends, limits, **options)

    def keep(self, said: Said) -> None:
        """Keep pieces."""
        for row, piece in said:
            self.pieces[row].append(piece)

    def work_once(self) -> None:
        """Work to the next boundary."""
        self.keep(self.engine.work())

    def ask(self, **fields: Any) -> Row:
        """Submit a request."""
        row = Row(Request(**fields), lambda ids: "".join(chr(200 + i) for i in ids), lambda _: None)
        self.engine.submit([row])
        return row

    def work(self) -> None:
        """Work until nothing is left."""
        for _ in range(10_000):
            self.work_once()
            if not self.engine.busy:
                return
        raise AssertionError("the engine does not come to an end")

    def ids(self, row: Row) -> list[int]:
        """Return a row's tokens, read from its text."""
        return [ord(letter) - 200 for piece in self.pieces[row] for letter in piece.text]


def prompts(count: int) -> list[tuple[int, ...]]:
    """Return prompts of 1 to 40 tokens, the first of which take one piece, several and many."""
    draw = random.Random(5)
    lengths = [1, 8, 9, 40, 2, 3] + [draw.randint(1, 30) for _ in range(count - 6)]
    return [tuple(draw.randrange(61) for _ in range(length)) for length in lengths]


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_answers_are_those_of_generate(model: Yaongi, ahead: bool) -> None:
    """Greedy and sampled rows together, that join and leave at any time; some end by themselves."""
    ends = (7, 30, 44)
    served, rows, draw = Collected(model, ends=ends, runs_ahead=ahead), [], random.Random(1)
    for number, prompt in enumerate(prompts(16)):
        sampling = [Sampling(), Sampling(1.0), Sampling(0.8, 5), Sampling(1.2, None, 0.8)][number % 4]
        rows.append(served.ask(prompt=prompt, max_tokens=1 + 3 * (number % 7), sampling=sampling, seed=number))
        for _ in range(draw.randint(0, 4)):
            served.work_once()
    served.work()
    lengths = set()
    for row in rows:
        request, settings = row.request, row.request.sampling
        options = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        wanted = generate(
            model, [request.prompt], max_new_tokens=request.max_tokens, seed=request.seed, stop=ends, **options
        )[0]
        assert served.ids(row) == wanted
        *_, last = served.pieces[row]
        assert last.finish == ("length" if len(wanted) == request.max_tokens else "stop")
        assert sum(piece.tokens for piece in served.pieces[row]) == len(wanted) + (last.finish == "stop")
        lengths.add(last.finish)
    assert lengths == {"stop", "length"}
    assert served.engine.load() == (0, 0)


def test_a_recorded_engine_warms_up_and_answers_the_same(model: Yaongi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what would be recorded is called twice for each length, and later answers are those of others."""
    calls: Counter[tuple[int, ...]] = Counter()

    def counted(function: Callable[..., None], *_: Any) -> Callable[..., None]:
        def run(*inputs: torch.Tensor) -> None:
            calls[tuple(inputs[0].shape)] += 1
            function(*inputs)

        return run

    monkeypatch.setattr(slots, "may_be_recorded", lambda model, cache: True)
    monkeypatch.setattr(slots, "GraphMemory", lambda: None)
    monkeypatch.setattr(slots, "GraphedFunction", counted)
    monkeypatch.setattr(slots, "SHORTEST_READ", 4)
    served = Collected(model, Limits(slots=3, capacity=64, chunk=16, queue=40), runs_ahead=True)
    assert served.engine.warm_up() == [4, 8, 16]
    assert calls == {(1, 4): 2, (1, 8): 2, (1, 16): 2}
    assert served.engine.load() == (0, 0)
    rows = [served.ask(prompt=prompt, max_tokens=5, alternatives=1, echo=True) for prompt in prompts(12)]
    served.work()
    assert any(rows > 1 for rows, _ in calls)
    for row in rows:
        assert served.ids(row) == generate(model, [row.request.prompt], max_new_tokens=5, stop=())[0]
        scored = [score for piece in served.pieces[row] for score in piece.scored]
        assert [score.token for score in scored] == [*row.request.prompt, *served.ids(row)]


@pytest.mark.gpu
def test_answers_on_a_gpu_are_those_of_generate() -> None:
    """Recorded readings and steps after the warm-up, and a long prompt in pieces, in float32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model = roughened(Yaongi(small_config("MM*M", engram=[ENGRAM], **GPU_SIZES))).to("cuda")
    served = Collected(model, Limits(slots=6, capacity=512, chunk=256, queue=40), runs_ahead=True)
    assert served.engine.warm_up() == [64, 128, 256]
    draw = random.Random(3)
    lengths = [1, 64, 65, 256, 300, 7, 120, 130, *(draw.randint(1, 60) for _ in range(16))]
    for _ in range(3):  # each shape as usual, recorded, and replayed
        rows = [served.ask(prompt=tuple(draw.choices(range(61), k=n)), max_tokens=9) for n in lengths]
        served.work()
        for row in rows:
            assert served.ids(row) == generate(model, [row.request.prompt], max_new_tokens=9, stop=())[0]
    torch.set_float32_matmul_precision(precision)


def test_an_engine_that_records_nothing_has_nothing_to_warm_up(model: Yaongi) -> None:
    assert Collected(model).engine.warm_up() == []


def test_copies_are_those_of_generate(model: Yaongi) -> None:
    served = Collected(model)
    rows = [served.ask(prompt=(5, 6), max_tokens=9, sampling=Sampling(1.0), seed=3, copy=i) for i in range(4)]
    served.work()
    wanted = generate(model, [(5, 6)] * 4, max_new_tokens=9, seed=3, stop=(), temperature=1.0)
    assert [served.ids(row) for row in rows] == wanted


@pytest.mark.parametrize("alternatives", [0, 2])
def test_scores_are_the_model_s(model: Yaongi, alternatives: int) -> None:
    """Of prompts in one piece, in several, and beside others; and of the answers' tokens."""
    served = Collected(model)
    rows = [
        served.ask(prompt=prompt, max_tokens=2, alternatives=alternatives, echo=number != 1)
        for number, prompt in enumerate(prompts(7))
    ]
    served.work()
    for number, row in enumerate(rows):
        scored = [score for piece in served.pieces[row] for score in piece.scored]
        ids = [*row.request.prompt, *served.ids(row)]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
        begin = 0 if number != 1 else len(row.request.prompt)
        assert [score.token for score in scored] == ids[begin:]
        for place, score in enumerate(scored, begin):
            if place == 0:
                assert score == (ids[0], None, ())
                continue
            assert score.logprob == pytest.approx(float(logprobs[place - 1, ids[place]]), abs=1e-4)
            best = logprobs[place - 1].topk(alternatives)
            assert [token for token, _ in score.likeliest] == best.indices.tolist()
            assert [value for _, value in score.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_long_prompt_stalls_others_by_one_piece(model: Yaongi) -> None:
    """While it is read, each boundary gives the running row a token."""
    served = Collected(model)
    running = served.ask(prompt=(1,), max_tokens=20)
    served.work_once()
    served.ask(prompt=tuple(range(40)), max_tokens=2)
    for _ in range(5):
        before = len(served.ids(running))
        served.work_once()
        assert len(served.ids(running)) == before + 1


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_a_cancelled_row_makes_room(model: Yaongi, ahead: bool) -> None:
    """One that waits, one whose prompt is being read, and one that is answered."""
    served = Collected(model, Limits(1, 64, 8), runs_ahead=ahead)
    first = served.ask(prompt=(1,), max_tokens=60)
    for _ in range(3):
        served.work_once()
    second, third = (served.ask(prompt=tuple(range(20)), max_tokens=40) for _ in range(2))
    served.engine.cancel([first])
    served.work_once()
    assert served.engine.load() == (1, 1)
    served.engine.cancel([second])
    last = served.ask(prompt=(4, 5), max_tokens=5)
    served.engine.cancel([third])
    served.work()
    assert not served.pieces[second]
    assert not served.pieces[third]
    assert served.ids(last) == generate(model, [(4, 5)], max_new_tokens=5, stop=())[0]
    assert served.engine.load() == (0, 0)


def test_a_full_queue_refuses_all_of_a_call(model: Yaongi) -> None:
    served = Collected(model, Limits(slots=2, capacity=64, queue=1))
    for _ in range(3):
        served.ask(prompt=(1, 2), max_tokens=3)
    with pytest.raises(QueueFullError):
        served.ask(prompt=(1, 2), max_tokens=3)
    served.work()
    rows = [Row(Request((1,), 2), lambda ids: "", lambda _: None) for _ in range(4)]
    with pytest.raises(QueueFullError):
        served.engine.submit(rows)
    assert served.engine.load() == (0, 0)
    served.engine.submit(rows[:3])


def test_logits_that_are_no_numbers_end_their_row_alone(model: Yaongi) -> None:
    broken = roughened(Yaongi(small_config()))
    with torch.no_grad():
        broken.backbone.embeddings.weight[60] = torch.nan
    served = Collected(broken)
    bad, good = served.ask(prompt=(60,), max_tokens=5), served.ask(prompt=(1, 2), max_tokens=5)
    served.work()
    assert served.pieces[bad] == [Piece(error="the model's logits are not finite numbers")]
    assert served.ids(good) == generate(broken, [(1, 2)], max_new_tokens=5, stop=())[0]
    again = [served.ask(prompt=(1, 2), max_tokens=5) for _ in range(3)]  # one of them in the bad one's slot
    served.work()
    assert all(served.ids(row) == served.ids(good) for row in again)


def test_the_thread_ends_and_says_so_to_those_that_are_left(model: Yaongi) -> None:
    served = Collected(model)
    thread = threading.Thread(target=served.engine.run, args=(served.keep,))
    thread.start()
    rows = [served.ask(prompt=(1,), max_tokens=60) for _ in range(8)]
    served.engine.stop()
    thread.join(30)
    assert not thread.is_alive()
    finished = [row for row in rows if served.pieces[row][-1].finish]
    assert all(served.pieces[row][-1].error == "the server has stopped" for row in rows if row not in finished)
    with pytest.raises(QueueFullError):
        served.ask(prompt=(1,), max_tokens=1)
