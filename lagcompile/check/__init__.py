"""Whether to believe an answer: certificates from autograd of the un-split network. Imports no backend."""
