"""Python: which name, which module, which bracket comes next."""

import random
from collections.abc import Sequence

Question = tuple[str, Sequence[str], int]  # context, choices, index of the right one

_NAMES = ("value", "number", "text", "items", "count", "total", "path", "line", "name", "word")
_CALLS = {
    "math": "sqrt(2)",
    "random": "random()",
    "json": 'loads("{}")',
    "time": "time()",
    "os": "getcwd()",
    "sys": "exit()",
    "re": 'compile("a")',
    "string": "digits",
}
_FUNCTIONS = ("double", "first", "show", "check", "clean", "measure")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def code_completion(rng: random.Random, number: int) -> Question:
    """Ask for what the lines before decide: a parameter, a loop's variable, a module, closing brackets."""
    return (_parameter, _loop_variable, _module, _brackets)[number % 4](rng)


def _parameter(rng: random.Random) -> Question:
    names = rng.sample(_NAMES, 4)
    right = rng.randrange(4)
    after = rng.choice((" * 2\n", "[0]\n", ".strip()\n", " + 1\n"))
    context = f"def {rng.choice(_FUNCTIONS)}({names[right]}):\n    return"
    return context, [f" {name}{after}" for name in names], right


def _loop_variable(rng: random.Random) -> Question:
    names = rng.sample(_NAMES, 4)
    right = rng.randrange(4)
    source = rng.choice(("range(10)", "data", "sorted(data)", "reversed(data)"))
    return f"for {names[right]} in {source}:\n    print(", [f"{name})\n" for name in names], right


def _module(rng: random.Random) -> Question:
    modules = rng.sample(sorted(_CALLS), 4)
    right = rng.randrange(4)
    context = f"import {modules[right]}\n\nresult ="
    return context, [f" {module}.{_CALLS[modules[right]]}\n" for module in modules], right


def _brackets(rng: random.Random) -> Question:
    opened = [rng.choice("([{") for _ in range(2)]
    closings = {"".join(_PAIRS[b] for b in reversed(opened))}
    while len(closings) < 4:
        closings.add("".join(rng.choice(")]}") for _ in range(2)))
    choices = sorted(closings)
    rng.shuffle(choices)
    inner = ", ".join(str(rng.randint(0, 9)) for _ in range(rng.randint(1, 3)))
    context = f"{rng.choice(_NAMES)} = {opened[0]}{rng.choice(_NAMES)}, {opened[1]}{inner}"
    return context, [f"{choice}\n" for choice in choices], choices.index("".join(_PAIRS[b] for b in reversed(opened)))
