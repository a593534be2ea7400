"""Running sparse models: the packed layer, transformers' plug-in, loading, generation. Needs no training code."""
