"""From a module to a program: capture, receipt, graph, split, stages, lower, plan."""
