"""Load and call a compiled library: TVM's runtime and numpy, nothing else."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from cat_plugin.errors import LibraryError
from cat_plugin.files import checked, read_json
from cat_plugin.graph.preparation import Preparation, are_class_names, is_preparation, preparation_of
from tvm_backend.elf import missing_part
from tvm_backend.images import prepared, top_of
from tvm_backend.processor import cpu_features, permit_amx

__all__ = ["FORMAT", "VERSION", "Library", "import_tvm", "load", "read_manifest"]

FORMAT = "cat-library"
VERSION = 1
_ALIGNMENT = 64
_LIMIT = 2 * 2**20
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


def read_manifest(path: Path) -> dict[str, Any]:
    """What the ``.json`` beside a library says: inputs, outputs, variants, kernels.  Nothing of the library is loaded.

    Raises
    ------
    LibraryError
        It is missing, damaged or of another format.
    """
    manifest = path.with_suffix(".json")
    parsed = read_json(manifest, _LIMIT, LibraryError, _REMEDY)
    if not isinstance(parsed, dict) or parsed.get("format") != FORMAT or parsed.get("version") != VERSION:
        raise LibraryError(
            f"{manifest} does not describe a library of format {FORMAT} {VERSION}; compile the model again"
        )
    for key, right in (("inputs", _is_tensor), ("outputs", _is_tensor), ("variants", _is_variant)):
        if not isinstance(parsed.get(key), list) or not parsed[key] or not all(map(right, parsed[key])):
            raise LibraryError(
                f"{manifest}: {key!r} is missing or not what belongs there; compile the model again"
            )
    batches = parsed.setdefault("batch_sizes", [])
    if not isinstance(batches, list) or not all(type(size) is int for size in batches):
        raise LibraryError(f"{manifest}: 'batch_sizes' is no list of integers; compile the model again")
    for key, fits in (("preparation", is_preparation), ("class_names", are_class_names)):
        if not fits(parsed.get(key)):
            raise LibraryError(f"{manifest}: {key!r} is not what belongs there; compile the model again")
    return parsed


def _is_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and all(isinstance(size, str) or (type(size) is int and 0 <= size < 2**63) for size in entry["shape"])
    )


def _is_variant(entry: Any) -> bool:
    features = entry.get("features", []) if isinstance(entry, dict) else None
    return (
        isinstance(features, list)
        and all(isinstance(name, str) for name in features)
        and all(isinstance(entry.get(key), str) for key in ("file", "target", "sha256"))
        and type(entry.get("size")) is int
        and isinstance(entry.get("machine", ""), str)
        and entry.get("device", "cpu") in ("cpu", "cuda")
    )


def _choose(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The first variant that this processor can run."""
    machine, available = platform.machine(), cpu_features()
    missing: list[str] = []
    for variant in manifest["variants"]:
        built_for = variant.get("machine", machine)
        lacking = sorted(set(variant.get("features", ())) - available) if available is not None else []
        if built_for == machine and not lacking and variant.get("amx") and not permit_amx():
            lacking = ["AMX tiles, which the operating system refuses"]
        if built_for == machine and not lacking:
            return dict(variant)
        missing.append(
            f"{variant['target']} (built for {built_for})"
            if built_for != machine
            else f"{variant['target']} needs {', '.join(lacking)}"
        )
    raise LibraryError(
        f"{path} cannot run on this {machine} processor: {'; '.join(missing)}. "
        "Compile on this machine with target='native', or with target='portable'"
    )


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


def _load_cuda_runtime(tvm: Any) -> None:
    """TVM's CUDA part, which its runtime-only mode leaves out; it needs the driver and the CUDA runtime."""
    try:
        # The system's own, or one that LD_LIBRARY_PATH names, goes before what pip has installed.
        ctypes.CDLL("libcudart.so.13", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        candidates = [str(Path(entry) / "cu13" / "lib" / "libcudart.so.13") for entry in _nvidia_packages()]
        for candidate in filter(os.path.exists, candidates):
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"))
    except OSError as error:
        raise LibraryError(
            f"the library runs on a CUDA device, whose runtime cannot be loaded here ({error}); it needs NVIDIA's driver "
            "and the CUDA 13 runtime (pip install nvidia-cuda-runtime). Compile with target='native' for the processor"
        ) from error


def _nvidia_packages() -> list[str]:
    """Where pip puts NVIDIA's libraries."""
    found = importlib.util.find_spec("nvidia")
    return list(found.submodule_search_locations or ()) if found is not None else []


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
    """

    def __init__(self, path: Path, manifest: dict[str, Any], variant: dict[str, Any], device: str) -> None:
        self._tvm = import_tvm()
        self.path, self.manifest, self.variant = path, manifest, variant
        if device == "cuda":
            _load_cuda_runtime(self._tvm)
        self._device = self._tvm.cuda(0) if device == "cuda" else self._tvm.cpu()
        self._inputs: list[dict[str, Any]] = manifest["inputs"]
        self._batches = frozenset(manifest["batch_sizes"])
        self._local = threading.local()
        try:
            self._module = sys.modules["tvm_ffi"].load_module(_spelling(path, variant))
            self._machine()
        except LibraryError:
            raise
        except Exception as error:
            raise LibraryError(
                f"{path} cannot be loaded by TVM {self._tvm.__version__}: {error}; it was compiled by TVM "
                f"{manifest.get('libraries', {}).get('tvm', '?')}: use that release or compile again"
            ) from error

    def __repr__(self) -> str:
        return f"<Library {self.path.name}: {self.variant['target']}>"

    def _machine(self) -> Any:
        """The calling thread's virtual machine: one machine must not run in two threads at once."""
        machine = getattr(self._local, "machine", None)
        if machine is None:
            machine = self._tvm.runtime.vm.VirtualMachine(self._module, self._device)
            self._local.machine = machine
            self._local.functions = {}
        return machine

    def _function(self, batch: int | None) -> Any:
        machine = self._machine()
        name = f"main_{batch}" if batch in self._batches else "main"
        functions = self._local.functions
        if name not in functions:
            functions[name] = machine[name]
        return functions[name]

    def __call__(self, *inputs: Any) -> Any:
        """Run the model.

        Parameters
        ----------
        *inputs : numpy.ndarray or DLPack tensor
            One for each input of the model.  Contiguous memory at a 64-byte boundary is used in place, other memory is
            copied.

        Returns
        -------
        numpy.ndarray or tensor
            Of the kind of the first input; a tuple when the model has several outputs.

        Raises
        ------
        LibraryError
            The number, dtype or shape of the inputs is not the model's.
        """
        if len(inputs) != len(self._inputs):
            raise LibraryError(f"the model takes {len(self._inputs)} input(s), not {len(inputs)}")
        sizes: dict[str, int] = {}
        tensors = [
            self._convert(value, expected, sizes)
            for value, expected in zip(inputs, self._inputs, strict=True)
        ]
        batch = next(iter(sizes.values()), None)
        if batch == 0:
            return self._empty(inputs[0])
        result = self._function(batch)(*tensors)
        if isinstance(result, self._tvm.runtime.Tensor):
            return _like(inputs[0], result)
        return tuple(_like(inputs[0], item) for item in result)

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
        result = self(prepared(images, self.preparation))
        return result if top is None else top_of(result, top, self.class_names)

    def _empty(self, like: Any) -> Any:
        outputs = [
            np.empty([0 if isinstance(d, str) else d for d in entry["shape"]], entry["dtype"])
            for entry in self.manifest["outputs"]
        ]
        results = [_like(like, self._tvm.runtime.tensor(output)) for output in outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def _convert(self, value: Any, expected: dict[str, Any], sizes: dict[str, int]) -> Any:
        """Check an input and make a TVM tensor of it, in place where its memory allows."""
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if (
            shape is None
            or dtype is None
            or not (isinstance(value, np.ndarray) or hasattr(value, "__dlpack__"))
        ):
            raise LibraryError(
                f"input {expected['name']!r} is a {type(value).__name__}; give a numpy array or a DLPack tensor"
            )
        found = str(dtype).rpartition(".")[2]
        if found == "uint8" and expected["dtype"] == "float32" and len(shape) == 4:
            raise LibraryError(
                f"input {expected['name']!r} has dtype uint8, the model takes float32: give images (N, H, W, C) to predict(), "
                "which prepares them as the model was calibrated"
            )
        if found != expected["dtype"]:
            raise LibraryError(
                f"input {expected['name']!r} has dtype {found}, the model takes {expected['dtype']}: convert it first"
            )
        _check_shape(tuple(int(size) for size in shape), expected, sizes)
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous or value.ctypes.data % _ALIGNMENT or not value.flags.writeable:
                return self._tvm.runtime.tensor(np.ascontiguousarray(value), self._device)
            return self._on_device(self._tvm.runtime.from_dlpack(value))
        try:
            return self._on_device(self._tvm.runtime.from_dlpack(value))
        except (ValueError, RuntimeError, BufferError, TypeError):  # misaligned, strided or with a gradient
            return self._tvm.runtime.tensor(_as_numpy(value), self._device)

    def _on_device(self, tensor: Any) -> Any:
        if str(tensor.device) == str(self._device):
            return tensor
        return tensor.copyto(self._device)


def _as_numpy(value: Any) -> np.ndarray:
    value = value.detach() if hasattr(value, "detach") else value
    value = value.cpu() if hasattr(value, "cpu") and callable(value.cpu) else value
    return np.ascontiguousarray(np.from_dlpack(value))


def _check_shape(shape: tuple[int, ...], expected: dict[str, Any], sizes: dict[str, int]) -> None:
    wanted = expected["shape"]
    good = len(shape) == len(wanted)
    for size, want in zip(shape, wanted, strict=False):
        good = good and (sizes.setdefault(want, size) if isinstance(want, str) else want) == size
    if not good:
        text = ", ".join(map(str, wanted))
        raise LibraryError(f"input {expected['name']!r} has shape {shape}, the model takes ({text})")


def _like(example: Any, tensor: Any) -> Any:
    """A result in the kind of tensor that the input was."""
    if isinstance(example, np.ndarray):
        return np.from_dlpack(tensor) if str(tensor.device).startswith("cpu") else tensor.numpy()
    package = type(example).__module__.partition(".")[0]
    module = sys.modules.get(package)
    if package not in ("tvm", "tvm_ffi") and hasattr(module, "from_dlpack"):
        return module.from_dlpack(tensor)  # type: ignore[union-attr]
    return tensor


def load(path: str | os.PathLike[str]) -> Library:
    """Load a compiled library.

    Parameters
    ----------
    path : path
        The ``.so`` that :func:`tvm_backend.compile` wrote, with its ``.json`` beside it.

    Returns
    -------
    Library
        A callable.

    Raises
    ------
    LibraryError
        A file is missing or damaged, or the processor lacks what the library was built for.
    """
    path = Path(path)
    manifest = read_manifest(path)
    variant = _choose(manifest, path)
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
    return Library(chosen, manifest, variant, str(variant.get("device", "cpu")))
