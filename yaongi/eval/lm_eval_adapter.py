"""A model for lm-evaluation-harness. `lm_eval` is imported here and in `harness.py` alone.

    lm = YaongiLM.load("RUN/model")
    results = lm_eval.simple_evaluate(model=lm, tasks=["kobest_copa"], num_fewshot=5)

lm-eval sees one process. Under `torchrun` every process prepares all requests, so that the examples in the prompts are
the same for any number of processes; the work is divided inside `score` and `answer`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import env as templates
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from yaongi.data.chats.template import ANSWER_HEADER, CHAT_TEMPLATE, render_chat
from yaongi.data.pieces import END_OF_TURN
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.answering import Answerer, Prompt
from yaongi.eval.encoding import CachedEncoder
from yaongi.eval.scoring import ALONE, Request, Scorer
from yaongi.model import Yaongi
from yaongi.model.sampling import Sampling
from yaongi.world import World

# lm-eval compiles a task's template anew for every question and example: nine tenths of its time for KMMLU.
templates.from_string = lru_cache(1024)(templates.from_string)

Prefix = Literal["none", "bos"]
NOTHING = -1  # stands for the token before a text that nothing precedes
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@register_model("yaongi")
class YaongiLM(TemplateLM):
    """A model as lm-eval sees it."""

    def __init__(
        self,
        scorer: Scorer,
        answerer: Answerer,
        *,
        prefix: Prefix = "none",
        max_new_tokens: int | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            prefix: what precedes a text without a context. `none`: nothing; its first token costs ln V. `bos`: the BOS
                token, as in other adapters, which our models have never read.
            max_new_tokens: no answer gets longer, whatever its task says.
        """
        super().__init__()
        self.scorer, self.answerer, self.prefix = scorer, answerer, prefix
        self.max_new_tokens = max_new_tokens
        self.default_new_tokens = 256
        self._encoder = CachedEncoder(answerer.tokenizer)
        self.mismatches = 0  # contexts whose tokens are not those that context and continuation begin with
        self.cut: Counter[str] = Counter()  # by task, the requests whose context was too long
        self.shortened: Counter[str] = Counter()  # by task, the answers that `max_new_tokens` shortened
        self._tasks: list[str] = []  # of the requests that are being encoded
        self._device = scorer.world.device

    @classmethod
    def load(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, world: World = ALONE, prefix: Prefix = "none"
    ) -> "YaongiLM":
        """Load a model folder.

        Args:
            dtype: None for float32 on a CPU and bfloat16 on a GPU.

        Raises:
            FileNotFoundError: a file is missing, the tokenizer's too.
            ValueError: a file is damaged, or the folder is not that of such a model.
        """
        default = torch.float32 if world.device.type == "cpu" else torch.bfloat16
        model = Yaongi.from_pretrained(folder, dtype=dtype or default, device=world.device).eval()
        tokenizer = Tokenizer.of_model(Path(folder))
        return cls(Scorer(model, world), Answerer(model, tokenizer, world), prefix=prefix)

    @property
    def max_length(self) -> int:
        """The longest sequence that the model reads."""
        return self.scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.answerer.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without a context."""
        return self.answerer.tokenizer.bos_id if self.prefix == "bos" else NOTHING

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keys prompts in the chat format by."""
        return f"yaongi-{self.answerer.tokenizer.hash[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template of the chat format, the only one."""
        return CHAT_TEMPLATE

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return messages as text: then an answer begins, or (`add_generation_prompt` False) the last one goes on."""
        text = render_chat(chat_history)
        return text + ANSWER_HEADER if add_generation_prompt else text.removesuffix(f"{END_OF_TURN}\n")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self._encoder(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation after its context, and whether greedy decoding gives it."""
        self._tasks = [str(request.task_name) for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, read in windows of `max_length` tokens."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append(_request(*make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.scorer.score(windows), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the answer to each prompt.

        Raises:
            ValueError: a task asks for more tokens than the model reads, or for a setting that there is not.
        """
        return self.answerer.answer([self._prompt(request) for request in requests])

    def _prompt(self, request: Instance) -> Prompt:
        text, asked = request.args
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.default_new_tokens))
        until, wanted, sampled = (settings.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
        chosen = {name: settings.pop(name) for name in SAMPLING if settings.get(name) is not None}
        settings = {name: value for name, value in settings.items() if value is not None}
        if settings:
            known = ", ".join(("until", "max_gen_toks", "do_sample", *SAMPLING))
            raise ValueError(f"eval: generation arguments must be among {known}, got {', '.join(settings)}")
        if self.max_new_tokens is not None and wanted > self.max_new_tokens:
            self.shortened[str(request.task_name)] += 1
            wanted = self.max_new_tokens
        sampling = Sampling(**chosen) if sampled else Sampling()
        return Prompt(text, tuple(stop for stop in until if stop), wanted, sampling)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        self.mismatches += self.tok_encode(context + continuation)[: len(context_ids)] != context_ids
        return context_ids, continuation_ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        for task, (_, context, continuation) in zip(self._tasks, requests, strict=True):
            self.cut[task] += len(context) + len(continuation) > self.max_length + 1
        scores = self.scorer.score([_request(context, continuation) for _, context, continuation in requests])
        return [(score.log_likelihood, score.greedy) for score in scores]


def _request(context: list[int], continuation: list[int]) -> Request:
    return Request([] if context == [NOTHING] else context, continuation)
