"""Reference against GPU: named and random cases, inputs, tolerances, comparison, the command."""
