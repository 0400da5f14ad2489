"""The benchmark: what a training step costs, against ordinary PyTorch and against itself.

`scripts/benchmark.py` is its command line. `configurations` and `variants` say what is measured,
`drivers` build it, `timing` measures it, `suite` puts a whole run together, `report` shows it.
"""
