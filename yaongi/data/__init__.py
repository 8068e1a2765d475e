"""Text to batches: sources, tokenizer, token shards, loader.

The rooms, in the order in which text passes through them:

* ``sources``, ``hub``, ``readers``, ``embedded``: where documents come from;
* ``text``, ``dedup``, ``decontaminate``: what is kept of them;
* ``tokenizer``, ``tokenizer_hf``: documents to ids and back, losslessly;
* ``pipeline``, ``shards``: ids on disk, written in parallel, checked by hash;
* ``mix``, ``permute``, ``loader``: ids to batches, as a pure function of (seed, sample).

``loader`` needs numpy and torch only; the other rooms import their libraries where they use them.
"""
