"""`python -m yaongi.kernels`: which ops this machine can run on which backend, and why not the others."""

import argparse

import torch

import yaongi
from yaongi.kernels.backend import BACKENDS, OPS, info, unavailable


def main() -> None:
    """Print the machine, a table of ops × backends, and the reason for each backend that can't run."""
    argparse.ArgumentParser(prog="python -m yaongi.kernels", description=__doc__).parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"yaongi {yaongi.__version__}, torch {torch.__version__}, {gpu}\n")
    width = max(map(len, OPS)) + 2
    print("op".ljust(width) + "".join(backend.ljust(14) for backend in BACKENDS))
    cells = {(row.op, row.backend): row.reason for row in info()}
    for name in OPS:
        reasons = (cells[name, backend] for backend in BACKENDS)
        marks = ("yes" if reason is None else "-" if reason == "not written" else "no" for reason in reasons)
        print(name.ljust(width) + "".join(mark.ljust(14) for mark in marks))
    print("\n- is not written. On a GPU tensor the leftmost yes runs; on a CPU tensor the reference.")
    for backend in BACKENDS:
        reason = unavailable(backend)
        if reason:
            print(f"{backend} can't run here: {reason}")


if __name__ == "__main__":
    main()
