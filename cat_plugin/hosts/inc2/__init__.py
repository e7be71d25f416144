"""Neural Compressor 2.x: the Python and the YAML API, and every patch of them.

After ``import cat_plugin`` the host takes, in Python,
``PostTrainingQuantConfig(recipes={"cat": True, "cat_args": {...}})`` and in YAML ``algorithm: cat`` (or
``algorithm: {cat: {...}}``, or ``recipes: {cat: true, cat_args: {...}}``) under ``quantization``.

A strategy that finds CAT in its recipes gets three functions of its own instance replaced while it
runs: the adaptor's ``quantize`` (which then returns a corrected model, wherever the host calls it:
in a trial, when it recovers the best one, without tuning), the generator of configurations (so that each
is tried with every configuration of CAT), and the converter in between (which carries CAT's options).
Options of the low-bit engine run that engine in place of the host's int8.
"""
