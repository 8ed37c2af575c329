"""Compare: methods on the same questions, with the same seeds and one budget; what is certain."""
