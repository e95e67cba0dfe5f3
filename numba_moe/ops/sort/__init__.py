"""The counting sort of slots by expert, which alignment and permutation stand on."""
