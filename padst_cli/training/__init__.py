"""Training the sparse model: sparse layers, moving supports, learned permutations, distillation, resumable state."""
