"""What the models see: corpora, and the items that are cut from them."""

from padst_cli.data.corpus import ImageCorpus, TextCorpus, default_spec, load_corpus

__all__ = ["ImageCorpus", "TextCorpus", "default_spec", "load_corpus"]
