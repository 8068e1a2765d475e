"""The web page, in a real browser: as wide as a phone and as a desk's screen, in Korean and in English."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import BROWSER, Page, browser
from serve_support import Serving, chain_model, until

from yaongi.data.tokenizer import Tokenizer
from yaongi.serve.engine import Limits

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a chromium")
RIGHT = "element => element.getBoundingClientRect().right"
ANSWER = "고양이는 나무 아래에 있다."
PICTURES = os.environ.get("YAONGI_PICTURES")  # a folder for pictures, to look at


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Return a tab of a browser."""
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def picture(page: Page, name: str) -> None:
    """Take a picture where some are wanted."""
    if PICTURES:
        page.picture(Path(PICTURES) / f"{name}.png")


@pytest.fixture(scope="module")
def talker(serve: Serving, tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    """Return a client of a model that always gives the same answer."""
    says = tokenizer.encode(ANSWER)
    assert len(set(says)) == len(says), "a chain has each token once"
    chain = [tokenizer.encode("assistant\n")[-1], *says, tokenizer.piece_to_id("<|im_end|>")]
    with serve(chain_model(tokenizer, chain)) as client:
        yield client


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("language", ["ko-KR", "en-US"])
def test_a_talk_in_the_browser(page: Page, talker: httpx.Client, width: int, language: str) -> None:
    """Each question goes out with the whole conversation before it; nothing is wider than the screen."""
    korean = language == "ko-KR"
    page.open(str(talker.base_url), width, language, "light" if korean else "dark")
    page.wait("document.getElementById('model').textContent === 'small'")
    assert page.do("document.documentElement.lang") == language[:2]
    assert page.do("document.getElementById('send').textContent") == ("보내기" if korean else "Send")
    assert page.do("document.getElementById('empty').textContent") == (
        "무엇이든 물어보세요." if korean else "Ask anything."
    )
    picture(page, f"empty-{width}-{language}")
    page.do(
        "document.getElementById('temperature').value = 0; document.getElementById('system').value = '짧게 말한다.'"
    )
    page.do("sent = []; send_it = fetch; fetch = (to, what) => { sent.push(what.body); return send_it(to, what); }; 0")
    messages = [{"role": "system", "content": "짧게 말한다."}]
    for number, question in enumerate(["고양이는 어디에 있니?", "Where is the cat? <b>&amp;</b>"], 1):
        messages.append({"role": "user", "content": question})
        page.do("document.getElementById('text').focus()")
        page.type(question)
        page.wait(f"document.querySelectorAll('.turn.assistant:not(.open)').length === {number}")
        assert json.loads(page.do("sent.at(-1)"))["messages"] == messages
        messages.append({"role": "assistant", "content": ANSWER})
        assert page.do("[...document.querySelectorAll('.turn.assistant')].at(-1).textContent") == ANSWER
        assert page.do("[...document.querySelectorAll('.turn.user')].at(-1).textContent") == question
    page.do("document.querySelector('details').open = true")
    assert page.do("document.documentElement.scrollWidth") <= width
    assert page.do(f"Math.max(...[...document.querySelectorAll('body *')].map({RIGHT}))") <= width
    picture(page, f"talk-{width}-{language}")
    page.do("document.getElementById('language').click()")
    assert page.do("document.getElementById('send').textContent") == ("Send" if korean else "보내기")
    page.do("document.getElementById('fresh').click()")
    assert page.do("document.querySelectorAll('.turn').length + history.length") == 0
    assert not page.complaints


def test_what_a_model_writes_is_text(page: Page, talker: httpx.Client) -> None:
    """Code blocks apart, it is never HTML; a long line scrolls in its block alone."""
    page.open(str(talker.base_url), 390, "en-US")
    written = "<img src=x onerror=fail()> **a**\n```python\nprint('<b>')" + "x" * 300 + "\n```\n\nend\n```\nopen"
    blocks = page.do(
        f"const node = add('assistant', {written!r}); [...node.children].map(e => e.tagName + ':' + e.textContent)"
    )
    assert blocks == [
        "P:<img src=x onerror=fail()> **a**",
        "PRE:print('<b>')" + "x" * 300,
        "P:end",
        "PRE:open",
    ]
    assert page.do("document.documentElement.scrollWidth") <= 390
    picture(page, "blocks-390")
    assert not page.complaints


def test_stopping_an_answer_frees_the_server(page: Page, serve: Serving, tokenizer: Tokenizer) -> None:
    """With a model that would go on for long; what had come is kept, and a note says so."""
    letters = [tokenizer.piece_to_id(f"<0x{ord(letter):02X}>") for letter in "mi"]
    chain = [tokenizer.encode("assistant\n")[-1], *letters, letters[0]]
    model = chain_model(tokenizer, chain, max_sequence_length=200_000)
    with serve(model, Limits(slots=1, capacity=200_000)) as client:
        page.open(str(client.base_url), 1280, "ko-KR")
        page.do("document.getElementById('temperature').value = 0; document.getElementById('text').focus()")
        page.type("hello")
        page.wait("document.querySelector('.turn.assistant')?.textContent.startsWith('mimi')")
        picture(page, "running-1280")
        assert page.do("document.getElementById('send').hidden")
        page.do("document.getElementById('stop').click()")
        page.wait("document.getElementById('stop').hidden")
        assert page.do("[...document.querySelectorAll('.note')].at(-1).textContent") == "멈췄습니다."
        assert page.do("history.at(-1).content").startswith("mimi")
        until(lambda: client.get("/health").json()["running"] == 0)
    page.do("document.getElementById('text').focus()")
    page.type("again")
    page.wait("[...document.querySelectorAll('.note')].at(-1).textContent === '서버에 닿지 못했습니다.'")


def test_a_long_talk_forgets_its_beginning(page: Page, talker: httpx.Client) -> None:
    """The page leaves out the oldest messages until the model can read the rest, and says so."""
    page.open(str(talker.base_url), 390, "ko-KR")
    turns = [{"role": role, "content": "고양이는 나무 아래에서 잔다."} for role in ("user", "assistant")] * 9
    page.do(f"history = {json.dumps(turns)}; document.getElementById('text').focus()")
    page.type("어디?")
    page.wait("document.querySelectorAll('.turn.assistant:not(.open)').length === 1")
    assert page.do("document.querySelector('.note').textContent").startswith("대화가 길어서 처음 ")
