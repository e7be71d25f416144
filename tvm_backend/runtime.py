"""Load and call a compiled library: TVM's runtime and numpy, nothing else."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from cat_plugin.errors import LibraryError
from cat_plugin.files import checked
from cat_plugin.graph.preparation import Preparation, preparation_of
from cat_plugin.graph.results import filled, result_of
from tvm_backend import pieces
from tvm_backend import threads as pool
from tvm_backend.arguments import in_order
from tvm_backend.cuda_runtime import ALONE, load_cuda_runtime
from tvm_backend.description import read_manifest
from tvm_backend.elf import missing_part
from tvm_backend.images import prepared, top_of
from tvm_backend.pace import Pace
from tvm_backend.tensors import as_numpy, check, check_finite, like
from tvm_backend.variants import choose
from tvm_backend.verify import verify as compare

__all__ = ["Library", "import_tvm", "load"]

_ALIGNMENT = 64
_KEPT_SIZES = 16
_REMEDY = "copy both files of the library again, or compile the model again"
_log = logging.getLogger("cat_plugin")


def import_tvm() -> Any:
    """TVM's runtime.  Importing TVM imports torch whenever it is installed; nothing here needs it."""
    hide = "tvm" not in sys.modules and "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm
        import tvm.runtime.vm
    except ImportError as error:
        raise LibraryError(
            f"a compiled library needs TVM's runtime, which cannot be imported ({error}); "
            "install it with: pip install 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi==0.1.14.post1'"
        ) from error
    finally:
        if hide:
            del sys.modules["torch"]
    return tvm


_loaded: dict[str, list[str]] = {}


def _spelling(path: Path, variant: dict[str, Any]) -> str:
    """A name for the dynamic linker that is new for new contents.

    The linker takes a name that it has seen for the library that it has, even when the file was replaced since; an
    extra ``./`` makes it look at the file.
    """
    seen = _loaded.setdefault(str(path), [])
    digest = str(variant["sha256"])
    if digest not in seen:
        seen.append(digest)
    return f"{path.absolute().parent}/{'./' * seen.index(digest)}{path.name}"


class Library:
    """A compiled model; call it like a function.

    It takes and returns numpy arrays or any DLPack tensors, may be called from several threads at once, and lets other
    Python threads run meanwhile.  Made by :func:`load`.

    Attributes
    ----------
    path : pathlib.Path
        The file that was loaded.
    manifest : dict
        What ``model.json`` says: inputs, outputs, variants, kernels.
    variant : dict
        The variant that was chosen for this processor.
    threads : int or None
        How many threads a call uses at most; None leaves it to TVM.
    check_finite : bool
        Whether inputs that hold a NaN or an infinity are refused.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        variant: dict[str, Any],
        device: str,
        threads: int | None = None,
        check_finite: bool = False,
    ) -> None:
        self.check_finite = check_finite
        self.threads = pool.bounded(threads)
        pool.be_considerate()
        self._tvm = import_tvm()
        self.path, self.manifest, self.variant = path, manifest, variant
        if device == "cuda":
            load_cuda_runtime(self._tvm)
        self._device = self._tvm.cuda(0) if device == "cuda" else self._tvm.cpu()
        self._alone = ALONE if device == "cuda" else nullcontext()
        given = pool.default(self._tvm)
        # What runs on a device is not divided among threads.
        self._most = 1 if device == "cuda" else self.threads or given
        self._inputs: list[dict[str, Any]] = manifest["inputs"]
        self._result = result_of(manifest)
        self._batches = frozenset(manifest["batch_sizes"])
        self._rows = (
            pieces.rows_at_once(self._inputs) if device == "cpu" and pieces.splits(manifest) else None
        )
        self._sizes: set[int | None] = set()
        self._local = threading.local()
        try:
            self._module = sys.modules["tvm_ffi"].load_module(_spelling(path, variant))
            self._function(None)
        except LibraryError:
            raise
        except Exception as error:
            raise LibraryError(
                f"{path} cannot be loaded by TVM {self._tvm.__version__}: {error}; it was compiled by TVM "
                f"{manifest.get('libraries', {}).get('tvm', '?')}: use that release or compile again"
            ) from error
        for size in sorted(self._batches):
            try:
                self._function(size)
            except Exception as error:
                raise LibraryError(
                    f"the description of {path} names {size} in 'batch_sizes', and the library has no code of its own for that; "
                    "copy both files of the library again, or compile the model again"
                ) from error

    def __repr__(self) -> str:
        return f"<Library {self.path.name}: {self.variant['target']}>"

    def _machine(self) -> Any:
        """The calling thread's virtual machine: one machine must not run in two threads at once."""
        machine = getattr(self._local, "machine", None)
        if machine is None:
            machine = self._tvm.runtime.vm.VirtualMachine(self._module, self._device)
            self._local.machine = machine
            self._local.functions, self._local.paces = {}, {}
        return machine

    def _function(self, batch: int | None) -> Any:
        machine = self._machine()
        name = f"main_{batch}" if batch in self._batches else "main"
        functions = self._local.functions
        if name not in functions:
            functions[name] = machine[name]
        return functions[name]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the model.

        Parameters
        ----------
        *inputs : numpy.ndarray or DLPack tensor
            One for each input of the model, or a mapping of all of them by name.  Contiguous memory at a 64-byte boundary is
            used in place, other memory is copied.
        **named : numpy.ndarray or DLPack tensor
            Further inputs, by the names that :attr:`manifest` lists.

        Returns
        -------
        numpy.ndarray or tensor, or a structure of these
            Of the kind of the first input; a tuple, list or dict where the model returns one.

        Raises
        ------
        LibraryError
            The number, dtype or shape of the inputs is not the model's, or one is not finite where that is checked.
        """
        names = [entry["name"] for entry in self._inputs]
        return filled(self._result, self.flat(*in_order(names, inputs, named)))

    def flat(self, *inputs: Any) -> list[Any]:
        """Outputs in the order in which :attr:`manifest` lists them, of inputs in that order; see :meth:`__call__`."""
        if len(inputs) != len(self._inputs):
            raise LibraryError(f"the model takes {len(self._inputs)} input(s), not {len(inputs)}")
        sizes: dict[str, int] = {}
        for value, expected in zip(inputs, self._inputs, strict=True):
            check(value, expected, sizes)
            if self.check_finite:
                check_finite(value, expected)
        batch = next(iter(sizes.values()), None)
        if batch == 0:
            return self._empty(inputs[0])
        with self._alone:
            if (
                batch is not None
                and self._rows is not None
                and batch > self._rows
                and batch not in self._batches
            ):
                return self._in_pieces(inputs, batch, self._rows)
            return [like(inputs[0], result) for result in self._run(inputs, batch)]

    def _run(self, inputs: Sequence[Any], batch: int | None) -> list[Any]:
        """The outputs as TVM's tensors."""
        if batch not in self._sizes and len(self._sizes) >= _KEPT_SIZES:
            self.release()  # of each batch size TVM keeps the memory
        self._sizes.add(batch)
        function, tensors = self._function(batch), [self._convert(value) for value in inputs]
        if self._most > 1:
            result = self._timed(function, tensors, batch)
        else:
            if self.threads is not None:  # other libraries of this thread may have more
                pool.use(self._tvm, self.threads, self.threads)
            result = function(*tensors)
        return [result] if isinstance(result, self._tvm.runtime.Tensor) else list(result)

    def _timed(self, function: Any, tensors: list[Any], batch: int | None) -> Any:
        """A call with as many threads as are of use just now."""
        pace = self._local.paces.get(batch)
        if pace is None:
            pace = self._local.paces[batch] = Pace(self._most)
        begun = time.perf_counter()
        used = pace.threads(begun)
        pool.use(self._tvm, used, self._most)
        result = function(*tensors)
        pace.took(used, begun, time.perf_counter())
        return result

    def _in_pieces(self, inputs: Sequence[Any], batch: int, rows: int) -> list[Any]:
        arrays = [value if isinstance(value, np.ndarray) else as_numpy(value) for value in inputs]
        outputs = [
            np.empty((batch, *entry["shape"][1:]), entry["dtype"]) for entry in self.manifest["outputs"]
        ]
        for start in range(0, batch, rows):
            piece = [array[start : start + rows] for array in arrays]
            for output, result in zip(outputs, self._run(piece, len(piece[0])), strict=True):
                output[start : start + rows] = result.numpy()
        self.release()
        if isinstance(inputs[0], np.ndarray):
            return list(outputs)
        return [like(inputs[0], self._tvm.runtime.tensor(output)) for output in outputs]

    def release(self) -> None:
        """Give the memory that is kept for later calls back to the operating system; that of all libraries at once.

        It is done by itself after a batch that was run in pieces, and where many batch sizes were seen.
        """
        self._sizes.clear()
        pieces.give_back(self._tvm)

    @property
    def preparation(self) -> Preparation | None:
        """How images are prepared for the model; None where nobody recorded it."""
        return preparation_of(self.manifest)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes; None where nobody recorded them."""
        names: list[str] | None = self.manifest.get("class_names")
        return names

    def predict(self, images: Any, top: int | None = None) -> Any:
        """Run the model on images, prepared as they were when it was calibrated.

        Parameters
        ----------
        images : ndarray of shape (N, H, W, C), uint8, or sequence of such of shape (H, W, C)
            RGB, or grey with one channel.
        top : int, optional
            How many classes to give of each image.

        Returns
        -------
        ndarray or Top
            What the model returns; with `top` the likeliest classes, their probabilities and names
            (:class:`tvm_backend.images.Top`).

        Raises
        ------
        LibraryError
            These are no images of the model's size, or the library does not say how to prepare them.
        """
        inputs = prepared(images, self.preparation)
        if top is None:
            return self(inputs)
        return top_of(self.flat(inputs)[self.classified], top, self.class_names)

    @property
    def classified(self) -> int:
        """Which output is the logits: the one that was corrected, else the only one.

        Raises
        ------
        LibraryError
            There are several, and none was corrected.
        """
        names, chosen = [entry["name"] for entry in self.manifest["outputs"]], self.manifest.get("classified")
        if len(names) > 1 and chosen not in names:
            raise LibraryError(
                f"the model returns {', '.join(names)}, and the library does not say which of them is the logits; call the "
                "library itself"
            )
        return names.index(chosen) if chosen in names else 0

    def _empty(self, example: Any) -> list[Any]:
        outputs = [
            np.empty([0 if isinstance(d, str) else d for d in entry["shape"]], entry["dtype"])
            for entry in self.manifest["outputs"]
        ]
        return [like(example, self._tvm.runtime.tensor(output)) for output in outputs]

    def _convert(self, value: Any) -> Any:
        """A checked input as a TVM tensor, in place where its memory allows."""
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous or value.ctypes.data % _ALIGNMENT or not value.flags.writeable:
                return self._tvm.runtime.tensor(np.ascontiguousarray(value), self._device)
            return self._on_device(self._tvm.runtime.from_dlpack(value))
        try:
            return self._on_device(self._tvm.runtime.from_dlpack(value))
        except (ValueError, RuntimeError, BufferError, TypeError):  # misaligned, strided or with a gradient
            return self._tvm.runtime.tensor(as_numpy(value), self._device)

    def _on_device(self, tensor: Any) -> Any:
        if str(tensor.device) == str(self._device):
            return tensor
        return tensor.copyto(self._device)


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    *,
    verify: bool = False,
    check_finite: bool = False,
) -> Library:
    """Load a compiled library.

    Parameters
    ----------
    path : path
        The ``.so`` that :func:`tvm_backend.compile` wrote, with its ``.json`` beside it.
    threads : int, optional
        How many threads a call uses at most, no more than this process has processors; by default what
        ``TVM_NUM_THREADS`` says, else what TVM chooses.  Small layers run on one.
    verify : bool, default False
        Whether to run it on the rows that lie beside it, and to compare the outputs with those stored for them.
    check_finite : bool, default False
        Whether a call refuses inputs that hold a NaN or an infinity, which costs a pass over them.  Without, infinities are
        clipped and a NaN is quantized to integer 0, as PyTorch does.

    Returns
    -------
    Library
        A callable.

    Raises
    ------
    LibraryError
        A file is missing or damaged, the processor lacks what the library was built for, or it computes something else
        than it did for its compiler.
    """
    path = Path(path)
    manifest = read_manifest(path)
    variant = choose(manifest, path)
    file = variant["file"]
    if file in ("", ".", "..") or Path(file).name != file:
        raise LibraryError(
            f"{path.with_suffix('.json')} names a file elsewhere ({file!r}); compile the model again"
        )
    chosen = path.with_name(file)
    with checked(chosen, variant, LibraryError, _REMEDY) as stream:
        if missing := missing_part(stream, variant["size"]):
            raise LibraryError(f"{chosen} is cut short: {missing} lies beyond its end; {_REMEDY}")
    _log.debug("loading %s for %s", chosen, variant["target"])
    library = Library(chosen, manifest, variant, str(variant.get("device", "cpu")), threads, check_finite)
    if verify:
        compare(library)
    return library
