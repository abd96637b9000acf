"""Executors: each turns an instance into a solution. A method is its frozen options; see `base.Method`."""
