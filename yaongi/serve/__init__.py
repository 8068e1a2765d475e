"""Answers over HTTP, in the protocol of OpenAI: requests that run together in one batch."""
