"""What others' tools reach on the same models, samples and machine: one script a peer, an environment each.

A script imports of this project only models, machine and words of `benchmarks`, and `benchmarks.peers.common`; it runs
alone in an environment that holds its peer. `benchmarks.peers.environments` makes the environments on demand and runs
the scripts; ``python -m benchmarks.peers`` does so from the command line.
"""

from __future__ import annotations
