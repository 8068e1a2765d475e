"""Engram against independent computations: table rows, gate and convolution, compression, the table's gradient."""

import unicodedata

import numpy as np
import pytest
import torch
from model_support import assert_relative, packed, small_config, small_model, token_ids

from yaongi.model import EngramConfig, Yaongi, compression_map
from yaongi.model.engram.hashing import hash_plans, hash_rows, ngram_window

LARGEST = 2**63 - 1


def is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))


def expected_rows(
    engrams: list[EngramConfig], vocab: int, ids: list[int], documents: list[int]
) -> list[list[list[int]]]:
    """Return the table rows, [Engram][token][orders·heads], computed with Python's integers."""
    used: list[int] = []
    result = []
    for engram in engrams:
        random = np.random.default_rng(engram.seed + 10007 * engram.layer)
        longest = max(engram.orders)
        multipliers = [2 * int(r) + 1 for r in random.integers(0, max(1, LARGEST // vocab // 2), longest)]
        heads, start = [], 0
        for order in engram.orders:
            for _ in range(engram.heads):
                prime = next(n for n in range(engram.rows, 10 * engram.rows) if is_prime(n) and n not in used)
                used.append(prime)
                heads.append((order, prime, start))
                start += prime
        tokens = []
        for t in range(len(ids)):
            rows = []
            for order, prime, first in heads:
                mix = 0
                for k in range(order):
                    inside = t - k >= 0 and documents[t - k] == documents[t]
                    product = (ids[t - k] if inside else vocab) * multipliers[k]
                    assert product <= LARGEST
                    mix ^= product
                rows.append(first + mix % prime)
            tokens.append(rows)
        result.append(tokens)
    return result


@pytest.mark.parametrize("orders", [(2,), (2, 3), (2, 3, 4), (3,), (2, 4)])
def test_addresses_against_python_numbers(orders: tuple[int, ...]) -> None:
    engrams = [EngramConfig(layer=layer, heads=3, head_dim=2, rows=40, orders=orders) for layer in (2, 26)]
    vocab, documents = 1000, packed((1, 2, 3, 14), (20,))
    ids = torch.randint(0, vocab, (2, 20))
    ids[0, 3] = vocab - 1
    window = ngram_window(ids, documents, max(orders), vocab)
    plans = hash_plans(engrams, vocab)
    for row in range(2):
        wanted = expected_rows(engrams, vocab, ids[row].tolist(), documents[row].tolist())
        for plan, rows in zip(plans, wanted, strict=True):
            assert hash_rows(window, plan, *plan.constants())[row].tolist() == rows


def test_no_product_overflows_at_any_vocabulary() -> None:
    engram = EngramConfig(layer=2, heads=1, head_dim=2, rows=40, orders=(2, 3, 4))
    for vocab in (1, 2, 3, 61, 32768, 262144):
        (plan,) = hash_plans([engram], vocab)
        assert all(m % 2 == 1 and 0 < m * vocab <= LARGEST for m in plan.multipliers)


@pytest.mark.parametrize("gate", ["paper", "demo"])
def test_engram_against_its_formula(gate: str) -> None:
    engram = EngramConfig(layer=0, heads=2, head_dim=4, rows=30, orders=(2, 3), gate=gate)  # type: ignore[arg-type]
    model = small_model("M", torch.float64, engram=[engram])
    module = model.backbone.layers[0].engram
    hidden, ids = torch.randn(2, 14, 24, dtype=torch.float64), token_ids(model, 2, 14)
    documents = packed((6, 8), (14,))
    window = ngram_window(ids, documents, 3, 61)
    found = module.table.weight[hash_rows(window, module.plan, module.primes, module.starts)].flatten(-2)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    key = norm(module.key_proj(found), module.key_norm.weight)
    score = (norm(hidden, module.hidden_norm.weight) * key).sum(-1, keepdim=True) / 24**0.5
    if gate == "demo":
        score = score.sign() * score.abs().clamp(min=1e-6).sqrt()
    value = score.sigmoid() * module.value_proj(found)
    normed = norm(value, module.value_norm.weight)
    conv = torch.zeros_like(normed)
    for t in range(14):
        for k in range(4):
            source = t - 3 * (3 - k)  # kernel 4, dilation 3
            for row in range(2):
                if source >= 0 and documents[row, source] == documents[row, t]:
                    conv[row, t] += module.conv.weight[:, 0, k] * normed[row, source]
    wanted = value + torch.nn.functional.silu(conv)
    assert_relative(module(hidden, window, documents), wanted, 1e-10)


def test_at_the_start_the_convolution_is_silent() -> None:
    model = Yaongi(small_config("M", engram=[EngramConfig(layer=0, heads=2, head_dim=4, rows=30)]))
    module = model.backbone.layers[0].engram
    window = ngram_window(token_ids(model, 1, 6), None, 3, 61)
    hidden = torch.randn(1, 6, 24)
    expected = module._gated_value(hidden, module.look_up(window))
    assert torch.equal(module(hidden, window, None), expected)


def test_the_tables_gradient_is_sparse_and_right() -> None:
    engram = {"layer": 1, "heads": 2, "head_dim": 4, "rows": 50, "orders": [2, 3]}
    sparse = small_model("ME", engram=[engram])
    dense = small_model("ME", engram=[engram | {"sparse_gradients": False}])
    ids = token_ids(sparse, 2, 10)
    for model in (sparse, dense):
        model.loss(ids).backward()
    name = "backbone.layers.1.engram.table.weight"
    found, wanted = (m.get_parameter(name).grad for m in (sparse, dense))
    assert found.is_sparse
    assert not wanted.is_sparse
    assert found.coalesce()._nnz() <= 2 * 10 * 4
    torch.testing.assert_close(found.to_dense(), wanted)


def test_compression_shares_ids_of_what_reads_the_same() -> None:
    nfd = unicodedata.normalize("NFD", "한")
    pieces = ["▁The", "the", "THE", "é", "E", "<0xE2>", "<0xe2>", "▁", "▁▁", "한", nfd, "ﬁ", "fi", b"\xe2", "\u0301"]
    ids = compression_map(pieces)
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 9]


def test_the_korean_variant_keeps_blanks_and_other_marks() -> None:
    pieces = ["▁the", "the", "The", "é", "e", "क", "कि", "क्", "▁한", "한"]
    assert compression_map(pieces, "korean").tolist() == [0, 1, 1, 2, 2, 3, 4, 5, 6, 7]
    assert len(set(compression_map(["क", "क्"]).tolist())) == 1  # the paper's variant strips the virama
    with pytest.raises(ValueError, match="compression_map: variant must be 'paper' or 'korean', got 'latin'"):
        compression_map(pieces, "latin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compression_map: pieces must be at least one, got none"):
        compression_map([])


def test_a_compressed_model_hashes_compressed_ids() -> None:
    engram = EngramConfig(layer=0, heads=2, head_dim=4, rows=30)
    config, table = small_config("M", engram=[engram]), [i // 2 for i in range(61)]
    model = Yaongi(config, compression=table)
    assert model.config.compressed_vocab_size == 31
    assert model.backbone.engram_pad == 31
    ids = token_ids(model, 1, 8)
    context = model.backbone.context(ids, None)
    assert torch.equal(context.window[:, 0], ids // 2)
    assert torch.equal(context.window[:, 1, 1:], ids[:, :-1] // 2)
    assert int(context.window[0, 2, 1]) == 31
    for compression, message in (
        ([0, 1], r"Yaongi: compression must be \(61,\) whole numbers from 0, got \(2,\)"),
        ([-1] * 61, "whole numbers from 0, got"),
    ):
        with pytest.raises(ValueError, match=message):
            Yaongi(config, compression=compression)
    with pytest.raises(ValueError, match="Yaongi: compression must be given for compressed_vocab_size = 31, got none"):
        Yaongi(model.config)
    with pytest.raises(ValueError, match="Yaongi: compression must have 31 ids, got 61"):
        Yaongi(model.config, compression=range(61))
