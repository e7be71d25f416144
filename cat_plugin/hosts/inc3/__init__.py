"""Neural Compressor 3.x: ``CATConfig``, the ``cat`` algorithm, and every patch of that API.

Typical use, after ``import cat_plugin``::

    from neural_compressor.torch.quantization import quantize
    corrected = quantize(model, cat_plugin.CATConfig(w_bits=4, a_bits=4), run_fn=calibrate)

``CATConfig(base=RTNConfig(bits=4))``, ``RTNConfig(bits=4) + CATConfig()`` and
``{"rtn": {"bits": 4}, "cat": {}}`` correct an algorithm of the host instead. Whatever the spelling,
the host sees one algorithm called ``cat``, which runs the base through the host's own functions.
"""

from __future__ import annotations

from cat_plugin.errors import HostError

# Before any other file of this package: once the host is imported, the import system asks for ``patches``, and every
# import in that file has to find a complete host.
try:
    import neural_compressor.torch.quantization  # noqa: F401
except ImportError as error:
    raise HostError(
        f"CATConfig belongs to Neural Compressor's 3.x torch API, which cannot be imported here ({error}); install "
        "neural-compressor[pt]>=3.2, or with 2.x use PostTrainingQuantConfig(recipes={'cat': True, 'cat_args': {...}})"
    ) from error

from cat_plugin.hosts import is_registered
from cat_plugin.hosts.inc3.config import CATConfig
from cat_plugin.hosts.inc3.patches import attach, detach

__all__ = ["CATConfig", "attach", "detach"]

if is_registered():
    attach()
