"""The offline half: run teacher encoders over images and write their features to a store."""
