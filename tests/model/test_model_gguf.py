"""GGUF files: read back with the gguf package; and, behind `long`, run by llama.cpp and compared with its converter."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from model_support import ENGRAM, roughened, small_config, small_model
from oracle import assert_equal_to_float64
from transformers import AutoModelForCausalLM

from yaongi.data.mix import PLAN
from yaongi.data.sources.embedded.corpus import embedded_sources
from yaongi.data.sources.sample import Sample
from yaongi.data.text import normalize
from yaongi.data.tokenizer import Tokenizer, train_tokenizer
from yaongi.export import Export
from yaongi.model import Yaongi
from yaongi.model.generation import generate

SIZES: dict[str, Any] = {  # sizes that llama.cpp's kernels take
    "hidden_size": 128,
    "vocab_size": 4096,
    "mamba_heads": 8,
    "mamba_head_dim": 16,
    "mamba_state": 16,
    "attention_head_dim": 32,
    "experts": 8,
    "expert_size": 64,
    "shared_expert_size": 128,
    "max_sequence_length": 512,
}
CHAT = ["<|im_start|>user\n안녕<|im_end|>\n<|im_start|>assistant\n", "a<|step|>b<|code|><|reserved_7|>", "\n" * 9]
NORMAL, USER_DEFINED, BYTE = 1, 4, 6  # of gguf.TokenType


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(Sample([s for s in embedded_sources() if s.split == "train"], PLAN, 1_500_000), 4096)


def texts() -> list[str]:
    """Return 200 texts: lines of held-out documents of every domain, chats, and runs of blanks and line breaks."""
    documents = [text for source in embedded_sources() if source.split == "val" for text in source.documents()]
    lines = [normalize(text)[start : start + 120] for text in documents for start in (0, 300)]
    step = max(1, len(lines) // 190)
    odd = ["", " ", "   a  b ", "x² ½ 👍🏽", "\t\tx", "12345", "ㅋㅋㅋ ㅠㅠ"]
    return [*CHAT, *odd, *lines[::step]][:200]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model without Engram, and its GGUF file `model.gguf`."""
    folder = tmp_path_factory.mktemp("model")
    small_model("MEM*ME", **SIZES).save_pretrained(folder)
    tokenizer.save(folder)
    Export(folder, gguf=folder / "model.gguf").run()
    return folder


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_the_file_says_what_llama_cpp_asks(folder: Path, tokenizer: Tokenizer) -> None:
    fields = fields_of(folder / "model.gguf")
    prefix = "nemotron_h_moe"
    expected = {
        "general.architecture": prefix,
        f"{prefix}.block_count": 6,
        f"{prefix}.feed_forward_length": [0, 64, 0, 0, 0, 64],
        f"{prefix}.attention.head_count_kv": [0, 0, 0, 2, 0, 0],
        f"{prefix}.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        f"{prefix}.ssm.inner_size": 128,
        f"{prefix}.expert_weights_scale": 2.5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": tokenizer.piece_to_id("<|im_end|>"),
    }
    assert {key: fields[key] for key in expected} == expected
    assert "<|im_start|>" in fields["tokenizer.chat_template"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_comes_back(dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small_model("MEM*ME", dtype, **SIZES)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    Export(tmp_path, gguf=tmp_path / "m.gguf").run()
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    state = model.state_dict()
    assert len(stored) == len(state)
    for own, name in {
        "backbone.embeddings.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "backbone.layers.0.mixer.in_proj.weight": "blk.0.ssm_in.weight",
        "backbone.layers.0.mixer.conv1d.weight": "blk.0.ssm_conv1d.weight",
        "backbone.layers.0.mixer.dt_bias": "blk.0.ssm_dt.bias",
        "backbone.layers.0.mixer.A_log": "blk.0.ssm_a",
        "backbone.layers.0.mixer.norm.weight": "blk.0.ssm_norm.weight",
        "backbone.layers.1.mixer.experts.down_proj": "blk.1.ffn_down_exps.weight",
        "backbone.layers.1.mixer.gate.e_score_correction_bias": "blk.1.exp_probs_b.bias",
        "backbone.layers.3.mixer.k_proj.weight": "blk.3.attn_k.weight",
    }.items():
        wanted = -state[own].exp() if own.endswith("A_log") else state[own]
        tensor = stored[name]
        assert tensor.tensor_type.name in ("F32", "BF16" if dtype == torch.bfloat16 else "F32")
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(found.flatten(), wanted.float().flatten()), name
        dimensions = [size for size in wanted.shape if size != 1]
        if "norm" not in name and name != "blk.0.ssm_a":
            assert list(tensor.shape)[::-1] == dimensions, name
    narrow = {name for name, tensor in stored.items() if tensor.tensor_type.name == "BF16"}
    assert ("blk.1.ffn_down_exps.weight" in narrow) == (dtype == torch.bfloat16)
    assert "blk.1.ffn_gate_inp.weight" not in narrow


class FileTokenizer:
    """llama.cpp's tokenizer of type `llama`, from a file's pieces, scores and types alone."""

    def __init__(self, fields: dict[str, Any]) -> None:
        pieces, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.scores = fields["tokenizer.ggml.scores"]
        self.whole = sorted((p for p, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED), key=len)[::-1]
        self.learnt = {p for p, kind in zip(pieces, kinds, strict=True) if kind == NORMAL}
        assert sum(kind == BYTE for kind in kinds) == 256

    def encode(self, text: str) -> list[int]:
        parts: list[str | int] = [text.replace(" ", "\u2581")]
        for piece in self.whole:
            parts = [new for part in parts for new in self._cut(part, piece)]
        return [i for part in parts for i in ([part] if isinstance(part, int) else self._merged(list(part)))]

    def _cut(self, part: str | int, piece: str) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        first, *rest = part.split(piece)
        yield first
        for other in rest:
            yield self.ids[piece]
            yield other

    def _merged(self, symbols: list[str]) -> list[int]:
        while True:
            pairs = [a + b for a, b in itertools.pairwise(symbols)]
            scored = [(-self.scores[self.ids[p]], i) for i, p in enumerate(pairs) if p in self.learnt]
            if not scored:
                break
            place = min(scored)[1]
            symbols[place : place + 2] = [pairs[place]]
        return [i for symbol in symbols for i in self._ids_of(symbol)]

    def _ids_of(self, symbol: str) -> list[int]:
        return [self.ids[symbol]] if symbol in self.learnt else [self.ids[f"<0x{b:02X}>"] for b in symbol.encode()]


def test_the_files_vocabulary_gives_the_ids_of_200_texts(folder: Path, tokenizer: Tokenizer) -> None:
    reader = FileTokenizer(fields_of(folder / "model.gguf"))
    assert len(texts()) == 200
    for text in texts():
        assert reader.encode(text) == tokenizer.encode(text), ascii(text)


def test_a_model_with_engram_is_written_without_it_only_when_told(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roughened(Yaongi(small_config(engram=[ENGRAM], **SIZES))).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"a file of before")
    with pytest.raises(
        ValueError, match=r"^export: model must be without Engram for a GGUF file, got one with it: --dr"
    ):
        Export(tmp_path, gguf=file).run()
    assert file.read_bytes() == b"a file of before"
    Export(tmp_path, gguf=file, drop_engram=True).run()
    assert capsys.readouterr().out.startswith("leaving out the Engram of layer 1 with ")
    assert not any("engram" in tensor.name for tensor in gguf.GGUFReader(file).tensors)
    assert sorted(path.suffix for path in tmp_path.iterdir() if "gguf" in path.name) == [".gguf"]


@pytest.mark.long
def test_llama_cpp_gives_the_same_ids_logits_and_greedy_text(folder: Path, tokenizer: Tokenizer) -> None:
    """Compare ours, transformers and llama.cpp in float32: 200 texts, logits, and 20 greedy prompts."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, built from its source package")
    options = {
        "n_ctx": 512,
        "n_batch": 512,
        "type_k": 0,
        "type_v": 0,
        "n_gpu_layers": 0,
        "verbose": False,
    }  # 0: float32
    llama = llama_cpp.Llama(str(folder / "model.gguf"), logits_all=True, **options)
    for text in texts():
        assert llama.tokenize(text.encode(), add_bos=False, special=text in CHAT) == tokenizer.encode(text), ascii(text)
    ours = Yaongi.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer.encode(text)[:40] for text in texts()[20:100:4]]
    assert len(prompts) == 20
    assert all(prompts)
    for prompt in prompts:
        llama.reset()
        llama.eval(prompt)
        with torch.no_grad():
            wanted = ours(torch.tensor([prompt]))[0]
        found = torch.from_numpy(np.array(llama.scores[: len(prompt)]))
        assert_equal_to_float64(found, wanted, 1e-5)
        answer = generate(ours, [prompt], max_new_tokens=24, stop=())[0]
        told = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        assert theirs.generate(ids, attention_mask=torch.ones_like(ids), **told)[0, len(prompt) :].tolist() == answer
        greedy = []
        for _ in range(24):
            greedy.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(greedy[-1:])
        assert greedy == answer


CONVERTER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf
from conversion.nemotron import NemotronHModel
if sys.argv[4] == "llama":
    NemotronHModel.set_vocab = NemotronHModel._set_vocab_sentencepiece
sys.argv[1:] = [sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f32"]
convert_hf_to_gguf.main()
"""


@pytest.mark.long
def test_llama_cpps_converter_writes_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    """Run the stock converter, whose folder LLAMA_CPP names: it stops at the tokenizer, but told its type it agrees."""
    source = os.environ.get("LLAMA_CPP")
    if not source:
        pytest.skip("needs llama.cpp's source: LLAMA_CPP=FOLDER")

    def convert(vocabulary: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CONVERTER, source, str(folder), str(tmp_path / "theirs.gguf"), vocabulary]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "BPE pre-tokenizer was not recognized" in convert("own").stderr
    done = convert("llama")
    assert done.returncode == 0, done.stderr
    ours, theirs = (gguf.GGUFReader(path) for path in (folder / "model.gguf", tmp_path / "theirs.gguf"))
    wanted = {tensor.name: tensor for tensor in theirs.tensors}
    assert wanted.keys() == {tensor.name for tensor in ours.tensors}
    for tensor in ours.tensors:
        assert list(tensor.shape) == list(wanted[tensor.name].shape), tensor.name
        pair = [tensor.data, wanted[tensor.name].data]
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            # It turns each head's rows as for RoPE, in queries and keys alike: without RoPE that changes nothing.
            pair = [np.sort(data.reshape(-1, 32, 128), axis=1) for data in pair]
        assert np.allclose(*pair, rtol=2e-7, atol=0), tensor.name  # exp of A_log may differ by a rounding
    fields, other = (fields_of(path) for path in (folder / "model.gguf", tmp_path / "theirs.gguf"))
    differ = {key for key in fields.keys() & other.keys() if fields[key] != other[key]}
    ignored = {"general.name", "GGUF.kv_count", "nemotron_h_moe.context_length", "tokenizer.ggml.token_type"}
    assert differ <= ignored, {key: (fields[key], other[key]) for key in differ}
    missing = {key for key in other.keys() - fields.keys() if key.startswith("nemotron_h_moe")}
    assert missing <= {"nemotron_h_moe.rope.dimension_count"}, json.dumps(sorted(missing))
