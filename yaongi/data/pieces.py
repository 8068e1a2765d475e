"""The fixed pieces that every tokenizer has, and SentencePiece's mark for a blank."""

CONTROL_PIECES = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>")

NEWLINE_RUNS = ("\n\n", "\n\n\n", "\n\n\n\n")

START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"

CHAT_PIECES = (START_OF_TURN, END_OF_TURN, "<|step|>", "<|code|>")

USER_PIECES = (*NEWLINE_RUNS, *CHAT_PIECES, *(f"<|reserved_{i}|>" for i in range(100)))

SPACE_MARK = "\u2581"
