"""The online half: stream stored features and supervise the hidden states of a language model with them."""
