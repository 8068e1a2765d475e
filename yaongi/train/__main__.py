"""`python -m yaongi.train --preset yaongi-tiny`: pretraining, on one device or under `torchrun`."""

from yaongi.train.program import main

if __name__ == "__main__":
    main()
