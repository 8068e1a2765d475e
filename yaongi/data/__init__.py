"""Text to batches.

The rooms, in the order in which text passes through them:

* `sources`: where documents come from;
* `text`, `dedup`, `decontaminate`: what is kept of them;
* `tokenizer`: documents to ids and back, losslessly; `hf_tokenizer`: the same for others;
* `shards`: ids on disk, checked by hash;
* `mix`, `permute`, `loader`: ids to batches, as a pure function of (seed, sample);
* `stages`: the commands of `python -m yaongi.data`, one file each.

`loader` needs numpy and torch only; the other rooms import their libraries where they use them.
"""
