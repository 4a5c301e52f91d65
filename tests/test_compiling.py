"""How kernels are compiled, kept and launched, and what is said where they can't be."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from attention_predictor import OffloadConfig, attach
from attention_predictor.csrc import attention, available, build, compiler, gather, kernel, ops
from attention_predictor.csrc.function import Function
from attention_predictor.csrc.gather import Timestamp
from attention_predictor.csrc.kernel import Kernel
from attention_predictor.csrc.layout import Fields, assertions, doubles, equal, integers, pointers
from attention_predictor.errors import BuildError

REMEMBERED = (compiler.chosen, build._warn_once, kernel._driver, kernel._context)
GPU = torch.device("cuda", 1)


def forget() -> None:
    for known in REMEMBERED:
        known.cache_clear()
    available._reasons.clear()
    gather.NOTE_TIME._loaded.clear()
    for function in available.FUNCTIONS:
        function._loaded = None


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing remembered of what was compiled, before and after."""
    monkeypatch.setenv("ATTENTION_PREDICTOR_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget()


# The CPU's functions


def library_times(_: int) -> list[int]:
    assert ops.why_no_kernels(torch.device("cpu")) is None
    return sorted(path.stat().st_mtime_ns for path in build.cache_directory().glob("*.so"))


@pytest.mark.slow
def test_processes_that_start_at_once_build_once(directory: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        times = processes.map(library_times, range(2))
    assert times[0] == times[1]
    count = len(available.FUNCTIONS)
    assert sorted(file.suffix for file in directory.iterdir()) == [".lock"] * count + [".so"] * count


def test_another_text_or_flag_is_another_library() -> None:
    one, two = 'extern "C" int number() { return 1; }', 'extern "C" int number() { return 2; }'
    first = build.cpu_library("gather.cpp", one, ())
    assert first.number() == 1
    assert build.cpu_library("gather.cpp", one, ())._name == first._name
    assert build.cpu_library("gather.cpp", one, ("-O1",))._name != first._name
    assert build.cpu_library("gather.cpp", two, ()).number() == 2


def test_a_failed_build_shows_what_the_compiler_said() -> None:
    with pytest.raises(BuildError, match=r"(?s)failed with exit code 1.*nothing"):
        build.cpu_library("gather.cpp", "int one() { return nothing; }", ())


@pytest.mark.slow
def test_without_a_compiler_torch_operations_serve_and_stats_say_so(monkeypatch, tiny_model, ids, caplog) -> None:
    model, prompt = tiny_model("llama"), ids(150)
    outputs = []
    for path, kernels in (("", "auto"), ("no-such-compiler", "auto"), ("", "none")):
        monkeypatch.setenv("CXX", path)
        forget()
        with attach(model, OffloadConfig(predictor="ema", budget=64, sink=16, recent=16, kernels=kernels)) as engine:
            outputs.append(model.generate(prompt, do_sample=False, max_new_tokens=12))
        assert bool(engine.stats.fallbacks) == bool(path)
    assert "a C++ compiler was not found: CXX=no-such-compiler" in next(iter(caplog.messages))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])


# Structs


HEADER = """#include "kernels.h"
struct Inner { const float *x; };
struct Outer { Inner inner; void *y, *z; int64_t n; double a; };
struct Typed { const int64_t *whole; float *out; const void *any; };
constexpr int kTile = 16;
"""


def struct(name: str, fields: Fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": fields})


INNER = ("inner", struct("Inner", pointers("x")))
RIGHT = [INNER, *pointers("y z"), *integers("n"), *doubles("a")]
WRONG: dict[str, Sequence] = {
    "[yz]": [INNER, *pointers("z y"), *integers("n"), *doubles("a")],
    "n": [INNER, *pointers("y z"), *doubles("n a")],
    "y": [INNER, *integers("y"), *pointers("z"), *integers("n"), *doubles("a")],
    "other": [INNER, *pointers("y other"), *integers("n"), *doubles("a")],
    "Outer has more fields": RIGHT[:-1],
    "more": [*RIGHT, *integers("more")],
    "inner": [*pointers("inner y z"), *integers("n"), *doubles("a")],
    "Inner": [("inner", struct("Inner", integers("x"))), *RIGHT[1:]],
}


def compile_with(name: str, text: str) -> None:
    """Raises BuildError where it does not compile."""
    if name == "c++":
        path = build.find_compiler("a C++ compiler", "CXX", ["c++", "g++", "clang++"])
        build.run([path, "-x", "c++", "-std=c++17", "-fsyntax-only", f"-I{build.SOURCES}", "-"], text)
        return
    try:
        one = compiler.Nvrtc() if name == "nvrtc" else compiler.Nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    one.compile(SimpleNamespace(name="program", text=text), (8, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["c++", "nvrtc", "nvcc"])
def test_a_struct_that_differs_in_python_does_not_compile(name: str) -> None:
    compile_with(name, HEADER + assertions(struct("Outer", RIGHT)))
    for field, fields in WRONG.items():
        with pytest.raises(BuildError, match=rf"\b{field}\b"):
            compile_with(name, HEADER + assertions(struct("Outer", fields)))


POINTERS = (("whole", "int64_t"), ("out", "float"), ("any", "void"))


@pytest.mark.parametrize("name", ["c++", "nvrtc", "nvcc"])
def test_what_a_pointer_points_to_is_compared(name: str) -> None:
    def typed(*given: tuple[str, str]) -> str:
        return HEADER + assertions(struct("Typed", [one for field in given for one in pointers(*field)]))

    compile_with(name, typed(*POINTERS))
    for number, wrong in enumerate(("int32_t", "double", "float")):
        field = POINTERS[number][0]
        with pytest.raises(BuildError, match=f"Typed.{field} is something else in Python"):
            compile_with(name, typed(*POINTERS[:number], (field, wrong), *POINTERS[number + 1 :]))


def test_a_typed_pointer_takes_addresses_and_none() -> None:
    one = struct("Typed", [one for field in POINTERS for one in pointers(*field)])(2**47, None, any=7)
    assert [getattr(one, field).value for field, _ in POINTERS] == [2**47, None, 7]


@pytest.mark.parametrize("name", ["c++", "nvrtc", "nvcc"])
def test_constants_are_compared(name: str) -> None:
    compile_with(name, HEADER + equal({"kTile": 16, "2 * kTile": 32, "kBFloat16": 2}))
    with pytest.raises(BuildError, match="kTile is not 8, as in Python"):
        compile_with(name, HEADER + equal({"kTile": 8}))


def test_every_program_compares_its_struct() -> None:
    for one in (*ops.every_kernel(), *available.FUNCTIONS):
        assert f"sizeof({one.struct.__name__}{{" in one.text


def test_a_function_takes_the_struct_that_python_gives_it() -> None:
    with pytest.raises(BuildError, match="gather_blocks does not take Timestamp alone"):
        Function("gather.cpp", "gather_blocks", Timestamp).load()


@pytest.mark.slow
def test_a_function_refuses_unknown_elements() -> None:
    with pytest.raises(RuntimeError, match="sparse_decode on a CPU: unknown type of elements"):
        attention.ON_CPU.call(attention.SparseDecode(element=3))


# Programs and the disk


class Counting:
    """A compiler that notes in a file what it compiled; ``seconds`` is how long it takes."""

    def __init__(self, log: Path, version: str = "one", seconds: float = 0.0) -> None:
        self.log, self.version, self.seconds = log, version, seconds

    def compile(self, one: Kernel, capability: tuple[int, int]) -> bytes:
        time.sleep(self.seconds)
        with self.log.open("a") as file:
            file.write(f"{one.name}\n")
        return f"{self.version} {one.name} {capability}".encode()

    def compiled(self) -> list[str]:
        return sorted(self.log.read_text().split()) if self.log.exists() else []


@pytest.fixture
def counting(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "log")


def some_kernels() -> list[Kernel]:
    return ops.kernels_of(torch.bfloat16, 128, sketch_bits=2, predictor="time-filters")


def test_programs_are_compiled_once_per_compiler_and_capability(counting: Counting, directory: Path, caplog) -> None:
    kernels = some_kernels()
    names = sorted(one.name for one in kernels)
    first = compiler.compiled(kernels, (9, 0), counting)
    assert first == [f"one {one.name} (9, 0)".encode() for one in kernels]
    assert counting.compiled() == names
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert caplog.messages[0].startswith(f"compiling {len(kernels)} GPU kernels, once")
    assert re.fullmatch(r"… done in \d+\.\d s", caplog.messages[1])
    assert compiler.compiled(kernels[::-1], (9, 0), counting) == first[::-1]
    assert counting.compiled() == names
    compiler.compiled(kernels[:2], (8, 0), counting)
    compiler.compiled(kernels[:2], (9, 0), Counting(counting.log, version="another"))
    assert len(counting.compiled()) == len(names) + 4
    assert len(caplog.records) == 6
    assert {file.suffix for file in directory.iterdir()} == {".cubin", ".lock"}


def test_a_damaged_file_is_compiled_anew(counting: Counting, directory: Path) -> None:
    kernels = some_kernels()[:3]
    first = compiler.compiled(kernels, (9, 0), counting)
    cut, changed, _ = directory.glob("*.cubin")
    cut.write_bytes(cut.read_bytes()[:-1])
    changed.write_bytes(b"")
    assert compiler.compiled(kernels, (9, 0), counting) == first
    assert compiler.compiled(kernels, (9, 0), counting) == first
    assert len(counting.compiled()) == 5


@pytest.mark.slow
def test_where_nothing_can_be_kept_all_is_compiled_anew(counting: Counting, monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setenv("ATTENTION_PREDICTOR_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    for _ in range(2):
        assert len(compiler.compiled(some_kernels()[:3], (9, 0), counting)) == 3
    assert len(counting.compiled()) == 6
    assert sum("can't be kept in" in line for line in caplog.messages) == 1
    assert ops.why_no_kernels(torch.device("cpu")) is None


def compile_some(counting: Counting) -> list[bytes]:
    return compiler.compiled(some_kernels()[:2], (9, 0), counting)


def test_processes_that_start_at_once_compile_once(counting: Counting) -> None:
    counting.seconds = 0.5
    with multiprocessing.get_context("fork").Pool(2) as processes:
        one, other = processes.map(compile_some, [counting] * 2)
    assert one == other
    assert len(counting.compiled()) == 2


def compile_for_ever(counting: Counting) -> None:
    counting.seconds = 600
    compile_some(counting)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_blocks_no_other(counting: Counting, directory: Path, number: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=compile_for_ever, args=(counting,))
    process.start()
    while not (directory / "cuda.lock").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert len(compile_some(counting)) == 2
    process.join()


def test_threads_wait_for_each_other(counting: Counting) -> None:
    counting.seconds = 0.2
    with ThreadPoolExecutor(4) as pool:
        assert len({tuple(found) for found in pool.map(compile_some, [counting] * 4)}) == 1
    assert len(counting.compiled()) == 2


def test_nvrtc_compiles_a_models_kernels() -> None:
    """All others: ``compile_all`` (.ci/run)."""
    try:
        nvrtc = compiler.Nvrtc()
    except BuildError as error:
        pytest.skip(str(error))
    assert all(binary.startswith(b"\x7fELF") for binary in compiler.compiled(some_kernels(), (9, 0), nvrtc))
    assert nvrtc.compile(gather.NOTE_TIME, (99, 0)).startswith(b"//")  # PTX, for what it does not know yet


# Launches


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, counting: Counting) -> mock.MagicMock:
    """Stands for CUDA's, of two GPUs."""
    fake = mock.MagicMock()
    fake.cuDeviceGet.side_effect = lambda number: (0, number)
    fake.cuDevicePrimaryCtxRetain.side_effect = lambda number: (0, f"context {number}")
    fake.cuModuleLoadData.side_effect = lambda image: (0, image)
    fake.cuModuleGetFunction.side_effect = lambda module, name: (0, name)
    fake.launched = []

    def launch(*arguments: object) -> tuple[int]:
        pointer = ctypes.cast(arguments[-2], ctypes.POINTER(ctypes.c_void_p)).contents  # type: ignore[arg-type]
        fake.launched.append((*arguments[:-2], bytes(ctypes.string_at(pointer.value or 0, 16))))
        return (0,)

    fake.cuLaunchKernel.side_effect = launch
    for name in ("cuCtxPushCurrent", "cuCtxPopCurrent", "cuFuncSetAttribute"):
        getattr(fake, name).return_value = (0,)
    monkeypatch.setattr(kernel, "bindings", lambda module: fake)
    monkeypatch.setattr(compiler, "chosen", lambda: counting)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return fake


def test_a_launch(driver: mock.MagicMock) -> None:
    one, arguments = Kernel("gather.cu", "note_time", Timestamp, threads=64), Timestamp(0xABC, -1)
    one.launch(GPU, (5, 4, 3), arguments)
    one.launch(GPU, (1, 1, 1), arguments, threads=32, shared_bytes=100)
    one.launch(GPU, (2, 1, 1), arguments, shared_bytes=50)
    one.launch(GPU, (0, 1, 1), arguments)
    name, sent = b"note_time_kernel", bytes(arguments)
    assert driver.launched == [
        (name, 5, 4, 3, 64, 1, 1, 0, 7, sent),
        (name, 1, 1, 1, 32, 1, 1, 100, 7, sent),
        (name, 2, 1, 1, 64, 1, 1, 50, 7, sent),
    ]
    assert driver.cuModuleLoadData.call_args_list == [mock.call(b"one note_time_kernel (9, 0)")]
    assert [call.args[2] for call in driver.cuFuncSetAttribute.call_args_list] == [100]
    one.launch(torch.device("cuda", 0), (1, 1, 1), arguments)
    assert [call.args for call in driver.cuCtxPushCurrent.call_args_list][-1] == ("context 0",)
    assert driver.cuModuleLoadData.call_count == 2
    assert driver.cuCtxPushCurrent.call_count == driver.cuCtxPopCurrent.call_count
    driver.cuLaunchKernel.side_effect = lambda *_: (SimpleNamespace(name="CUDA_ERROR_LAUNCH_FAILED"),)
    with pytest.raises(RuntimeError, match=r"note_time_kernel on cuda:1, .*: CUDA's driver: CUDA_ERROR_LAUNCH_FAILED"):
        one.launch(GPU, (1, 1, 1), arguments)
    assert driver.cuCtxPushCurrent.call_count == driver.cuCtxPopCurrent.call_count


def test_what_is_prepared_is_compiled_together_and_loaded(driver: mock.MagicMock, counting: Counting, caplog) -> None:
    kernels = [Kernel("gather.cu", name, Timestamp, threads=1) for name in ("append_token", "move_blocks")]
    assert ops.why_no_kernels(GPU) is None
    with caplog.at_level(logging.WARNING):
        assert ops.prepare(GPU, kernels) is None
    assert caplog.messages[0].startswith("compiling 2 GPU kernels")
    before = len(counting.compiled())
    kernels[0].launch(GPU, (1, 1, 1), Timestamp())
    assert len(counting.compiled()) == before
    assert len(driver.launched) == 1


def test_a_kernel_that_does_not_compile_is_said_once(driver: mock.MagicMock, counting: Counting, caplog) -> None:
    assert ops.why_no_kernels(GPU) is None
    counting.compile = mock.Mock(side_effect=BuildError("one refused move_blocks\nline 3: no"))  # type: ignore[method-assign]
    for _ in range(2):
        assert ops.prepare(GPU, [Kernel("gather.cu", "move_blocks", Timestamp, threads=1)]) == "one refused move_blocks"
    assert ops.why_no_kernels(GPU) == "one refused move_blocks"
    assert sum("line 3: no" in line for line in caplog.messages) == 1


# Why there are none


def test_reasons(driver: mock.MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.why_no_kernels(torch.device("meta")) == "no kernels are written for meta"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0 or higher, this one has 7.5" in (ops.why_no_kernels(GPU) or "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert ops.why_no_kernels(torch.device("cuda", 0)) == "no kernels are written for ROCm"


def nvrtc(**changes: object) -> dict[str, object]:
    """Modules in place of NVIDIA's."""
    bindings = SimpleNamespace(nvrtcVersion=lambda: (0, 12, 8))
    finder = SimpleNamespace(find_nvidia_header_directory=lambda name: "/include")
    for name, value in changes.items():
        setattr(bindings if name.startswith("nvrtc") else finder, name, value)
    return {"cuda": SimpleNamespace(), "cuda.bindings.nvrtc": bindings, "cuda.pathfinder": finder}


def not_found() -> None:
    raise RuntimeError("libnvrtc.so.12 was not found")


@pytest.mark.parametrize(
    ("modules", "version", "reason"),
    [
        ({"cuda.bindings.nvrtc": None}, "12.8", 'cuda-bindings is not installed: pip install "cuda-bindings==12.*"'),
        ({"cuda.bindings.nvrtc": None}, "13.0", 'cuda-bindings is not installed: pip install "cuda-bindings==13.*"'),
        (nvrtc(nvrtcVersion=not_found), "12.8", "NVRTC was not found: pip install nvidia-cuda-nvrtc-cu12"),
        (
            nvrtc(find_nvidia_header_directory=lambda name: None),
            "13.0",
            "CUDA's headers were not found: pip install nvidia-cuda-runtime",
        ),
        (nvrtc() | {"cuda.pathfinder": SimpleNamespace()}, "13.0", "cuda-pathfinder is older than 1.3"),
    ],
)
def test_without_a_cuda_compiler(monkeypatch, modules: dict, version: str, reason: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernel, "bindings", lambda module: mock.MagicMock())
    monkeypatch.setenv("CUDACXX", "no-such-compiler")
    assert (ops.why_no_kernels(GPU) or "").startswith(reason)
    monkeypatch.setenv("CUDACXX", "c++")  # as good as nvcc here
    compiler.chosen.cache_clear()
    assert isinstance(compiler.chosen(), compiler.Nvcc)
