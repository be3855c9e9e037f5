"""The contract between the two halves: what a feature store holds and the code that writes and reads it."""
