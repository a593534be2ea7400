"""Permutations of a layer's inputs or outputs: index vectors, the search by assignment, and the soft learner."""
