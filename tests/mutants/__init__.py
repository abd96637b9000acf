"""Mutation runs: small faults are put into the code, and the tests that cover it must notice."""
