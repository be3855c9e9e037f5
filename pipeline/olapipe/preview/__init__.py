"""Seeing what is stored: features decoded back to depth maps, panoptic maps, images and PCA colours."""
