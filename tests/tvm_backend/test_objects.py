"""Functions compiled one by one: kept, checked, and the same whoever makes them."""

from __future__ import annotations

import hashlib

import pytest
import tvm

from tvm_backend import objects as module
from tvm_backend.kernels import registry
from tvm_backend.kernels.spec import Epilogue, LinearSpec, QParams, QuantizeSpec
from tvm_backend.objects import Source, objects, symbol_of
from tvm_backend.target import resolve

(TARGET,) = resolve("native").values()
BYTES = QParams(0.1, 0, 0, 255, "uint8")


def sources(built):
    """Three functions, which note when they are written."""

    def source(spec):
        made = registry.lower(spec, TARGET)

        def build(name):
            built.append(name)
            return made.generator.build(name)

        return symbol_of(made.name, made.generator.form), Source(repr(made.generator.form), build)

    return dict(
        map(
            source,
            [
                LinearSpec(1, 8, 16, BYTES, Epilogue()),
                LinearSpec(1, 8, 16, BYTES, Epilogue(outputs=(BYTES,))),
                QuantizeSpec(1, (8,), (BYTES,)),
            ],
        )
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def compiled(functions, directory, **options):
    directory.mkdir()
    return [path.read_bytes() for path in objects(functions, TARGET, directory, **options)]


def test_a_function_is_compiled_once_and_its_object_is_that_of_one_thread_alone(tmp_path, cache):
    built = []
    functions = sources(built)
    first = compiled(functions, tmp_path / "a")
    assert sorted(built) == sorted(functions)
    assert len(list(cache.iterdir())) == 3
    built.clear()
    assert compiled(functions, tmp_path / "b") == first
    assert not built
    for (name, source), code in zip(functions.items(), first, strict=True):
        alone = tvm.IRModule({name: source.build(name).with_attr("global_symbol", name)})
        tvm.tirx.build(alone, target=TARGET).write_to_file(str(tmp_path / "alone.o"))
        assert (tmp_path / "alone.o").read_bytes() == code


def test_a_damaged_object_is_compiled_anew(tmp_path, cache):
    built = []
    functions = sources(built)
    first = compiled(functions, tmp_path / "a")
    for path, damage in zip(sorted(cache.iterdir()), (b"", b"x" * 40, None), strict=True):
        content = path.read_bytes()
        path.write_bytes(content[:-1] if damage is None else damage)
    built.clear()
    assert compiled(functions, tmp_path / "b") == first
    assert len(built) == 3
    for path in cache.iterdir():
        content = path.read_bytes()
        assert hashlib.sha256(content[32:]).digest() == content[:32]


def test_no_more_than_so_many_are_kept_and_none_where_that_is_not_wanted(tmp_path, cache, monkeypatch):
    functions = sources([])
    compiled(functions, tmp_path / "a", keep=False)
    assert not cache.exists()
    monkeypatch.setattr(module, "KEPT", 2)
    compiled(functions, tmp_path / "b")
    assert len(list(cache.iterdir())) == 2


def test_an_error_of_one_function_is_raised(tmp_path, cache):
    def fail(_name):
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        compiled({**sources([]), "bad": Source("bad", fail)}, tmp_path / "a")


def test_what_tvm_cannot_compile_as_it_was_scheduled_is_compiled_as_it_came(tmp_path, cache, monkeypatch):
    build = module._build

    def failing(symbol, function, *rest):
        if "scheduled" in function.attrs:
            raise tvm.error.InternalError("no such vector")
        build(symbol, function, *rest)

    plain = registry.lower(QuantizeSpec(1, (8,), (BYTES,)), TARGET).generator.build("plain")
    (wanted,) = compiled({"plain": Source("a", lambda _name: plain)}, tmp_path / "a")
    monkeypatch.setattr(module, "_build", failing)
    written = plain.with_attr("scheduled", True)
    assert compiled({"plain": Source("b", lambda _name: written, plain)}, tmp_path / "b") == [wanted]
    with pytest.raises(tvm.error.InternalError, match="no such vector"):
        compiled({"plain": Source("c", lambda _name: written)}, tmp_path / "c")
