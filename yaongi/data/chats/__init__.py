"""Conversations: their format, their ids with the mask of what is learnt, and the rows that a trainer reads."""
