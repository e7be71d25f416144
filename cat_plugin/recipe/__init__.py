"""The recipe: the file, its options, criteria and the record of a tuning run."""
