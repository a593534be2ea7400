"""Checkpoints as bytes and names: reading sources, the packed format's header, atomic writing, the model card."""
