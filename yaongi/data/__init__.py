"""The data pipeline, from text to batches.

Its modules, in the order in which text passes through them:

* `sources`: where documents come from;
* `text`, `filters`: which documents are kept;
* `tokenizer`: documents to ids and back, losslessly; `hf_tokenizer`: the same tokenizer in Hugging Face's format;
* `shards`: ids on disk, checked by hash;
* `chats`: conversations, as ids with a mask of what is learnt, and packed into rows;
* `mix`, `streams`, `permute`, `loader`: ids to batches, as a pure function of (seed, sample); `epochs`: how often;
* `stages`: the commands of `python -m yaongi.data`, one file each.

`loader` needs only numpy and torch; the other modules import their libraries where they use them.
"""
