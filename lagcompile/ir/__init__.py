"""The intermediate representation: programs as plain data. Nothing in this folder imports torch."""
