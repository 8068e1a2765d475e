"""The `recompute` policy: which layers discard their activations and recompute them in the backward pass."""

KINDS = {"mamba": "M", "experts": "E", "attention": "*"}
# Time per GB saved on an H100: Mamba layers 2.2 ms, experts and attention 6.1 ms (benchmarks/bench_layers.py).
CHEAPEST, MOST = "mamba", "all"


def recomputed_layers(policy: str, pattern: str) -> tuple[int, ...]:
    """Return the indices of the layers that a policy names.

    Args:
        policy: "none", "all", or a comma-separated list of kinds of layers (mamba, experts, attention), layers (7) and
            ranges (0-25).
        pattern: one letter per layer, as in the model's config.

    Raises:
        ValueError: the policy has another word, or names a layer that the model doesn't have.
    """
    layers = range(len(pattern))
    chosen: set[int] = set()
    for word in policy.split(","):
        first, _, last = word.partition("-")
        if word == "all":
            chosen |= set(layers)
        elif word in KINDS:
            chosen |= {i for i in layers if pattern[i] == KINDS[word]}
        elif first.isdecimal() and (last.isdecimal() or last == "" == word[len(first) :]):
            named = range(int(first), int(last or first) + 1)
            if not named or named[-1] not in layers:
                raise ValueError(f"config: recompute must name layers 0 to {layers[-1]}, got {word!r}")
            chosen |= set(named)
        elif word != "none":
            raise ValueError(
                f"config: recompute must be none, all, {', '.join(KINDS)}, layers (7) or ranges (0-25), by commas, "
                f"got {word!r}"
            )
    return tuple(sorted(chosen))
