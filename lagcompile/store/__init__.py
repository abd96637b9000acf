"""Runs in folders: what a killed, stopped or damaged run goes on from."""
