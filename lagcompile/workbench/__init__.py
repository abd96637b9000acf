"""The workbench: specs, named models and data, runs, reports, plots, benchmarks, the command line."""
