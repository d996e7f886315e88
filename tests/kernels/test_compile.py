"""The CUDA kernels compile for every architecture they are meant for; no GPU, no toolkit needed.

Compiled with NVRTC, as on a user's machine, with the options that the launcher passes. `pytest -rP`
on this file prints the registers, stack and spills of every variant.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("NVRTC's wheels are installed on Linux only", allow_module_level=True)

from cuda.bindings import nvrtc

from gspn2_diffusers import kernels
from gspn2_diffusers.kernels import launch, plans

ARCHITECTURES = (75, 80, 90, 100, 120)
KERNELS_PER_PROGRAM = 32
"""Enough to share the parsing of the sources, few enough for a readable log."""
BESIDE = {
    plans.FORWARD: [
        *(f"pack_tokens<{size}>" for size in (2, 4)),
        *(f"ready_weights<{name}>" for name in plans.NUMBER_FORMATS.values()),
    ],
    plans.BACKWARD: [
        *(f"unpack_tokens<{size}>" for size in (2, 4)),
        *(f"add_shares<{name}>" for name in plans.NUMBER_FORMATS.values()),
    ],
}
"""What runs before or after a scan."""
FOLDER = Path(kernels.__file__).parent


@dataclass
class Assembled:
    """What the assembler reports of one kernel: registers per thread, bytes per thread."""

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


class CompileError(Exception):
    """The compiler refused the sources or had something to say about them."""


def build(source: str, names: list[str], options: tuple[str, ...]) -> dict[str, Assembled]:
    """Compile the kernels `names` (C++ name expressions) and read the assembler's report.

    Raises:
        CompileError: errors, warnings, or a log that is not understood.
    """
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"gspn2.cu", 0, [], []))
    try:
        for name in names:
            _checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
        flags = [option.encode() for option in (*options, "--ptxas-options=-v")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        # Longer than one byte: NVRTC writes into it, and Python has only one b" " for everybody.
        log = b" " * (1 + _checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        log = log.decode().rstrip("\0 ")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(log)
        assert _checked(nvrtc.nvrtcGetCUBINSize(program)) > 0
        mangled = {
            _checked(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode(): name
            for name in names
        }
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return {mangled[symbol]: report for symbol, report in read_log(log).items()}


REPORT = {
    "symbol": r"Compiling entry function '(?P<symbol>\w+)' for '\w+'",
    "memory": r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads",
    "registers": r"Used (?P<registers>\d+) registers.*",
    "other": r"Function properties for .*|Compile time = .*|\d+ bytes gmem.*",
}
REPORT_LINE = re.compile(rf"ptxas (?:info +:|  +\.) +(?:{'|'.join(REPORT.values())})")


def read_log(log: str) -> dict[str, Assembled]:
    """The report of each kernel by its mangled name. Raises CompileError on any other line."""
    kernels: dict[str, Assembled] = {}
    latest = None
    for line in filter(None, map(str.strip, log.splitlines())):
        match = REPORT_LINE.fullmatch(line)
        if match is None:
            raise CompileError(f"unexpected line: {line}\n{log}")
        facts = {name: value for name, value in match.groupdict().items() if value is not None}
        if "symbol" in facts:
            latest = kernels[facts.pop("symbol")] = Assembled()
        for name, value in facts.items():
            setattr(latest, name, int(value))
    return kernels


def _checked(result):
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(nvrtc.nvrtcGetErrorString(status)[1].decode())
    return values[0] if values else None


def options_for(architecture: int) -> tuple[str, ...]:
    """The launcher's options and those that CuPy adds."""
    cupy = ("-ftz=true", f"-arch=sm_{architecture}", "--device-as-default-execution-space")
    return (*launch.OPTIONS, *cupy)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernel", [plans.FORWARD, plans.BACKWARD])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_every_variant_compiles_without_a_warning_and_without_spilling(architecture, kernel):
    if architecture not in _checked(nvrtc.nvrtcGetSupportedArchs()):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    variants = plans.variants(divmod(architecture, 10))
    names = sorted(variant.name for variant in variants if variant.kernel == kernel)
    assert len(set(names)) == len(names) > 30
    names += BESIDE[kernel]
    built: dict[str, Assembled] = {}
    for start in range(0, len(names), KERNELS_PER_PROGRAM):
        part = names[start : start + KERNELS_PER_PROGRAM]
        built |= build(launch.SOURCE, part, options_for(architecture))

    print(f"\nsm_{architecture}: {len(names)} variants of {kernel}")
    print("registers, stack and spilled bytes per thread")
    for name in names:
        report = built[name]
        print(f"{report.registers:5} {report.stack:5} {report.spills:5}  {name}")
    spilling = [name for name in names if built[name].spills]
    assert not spilling, f"{len(spilling)} of {len(names)} kernels spill on sm_{architecture}"


def test_sources_include_no_header_but_their_own():
    for path in sorted(FOLDER.glob("*.cu*")):
        for line in re.findall(r"^\s*#\s*include.*", path.read_text(), re.MULTILINE):
            own = re.fullmatch(r'\s*#\s*include\s+"([\w.]+)"', line)
            assert own and (FOLDER / own[1]).is_file(), f"{path.name}: {line.strip()}"


def test_the_program_given_to_the_compiler_includes_nothing():
    assert not re.findall(r"^\s*#\s*include.*", launch.SOURCE, re.MULTILINE)


KEEPS_MANY_VALUES = """
template <int N> __global__ void __launch_bounds__(1024) kernel(float* x) {
  float kept[N];
  #pragma unroll
  for (int i = 0; i < N; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < N; ++i) x[i * 1024 + threadIdx.x] = kept[i] * kept[N - 1 - i];
}
"""


@pytest.mark.parametrize("count, spills", [(4, False), (200, True)])
def test_spilled_registers_are_seen(count, spills):
    (report,) = build(KEEPS_MANY_VALUES, [f"kernel<{count}>"], ("-arch=sm_90",)).values()
    assert 0 < report.registers <= 64
    assert bool(report.spills) == spills


@pytest.mark.parametrize(
    "body, message",
    [
        ("int unused;", "warning #177-D"),
        ("return 1;", "error"),
        ("x[0] = half(1);", "error"),
    ],
)
def test_warnings_and_errors_are_raised(body, message):
    source = f"template <int N> __global__ void kernel(float* x) {{ {body} }}"
    with pytest.raises(CompileError, match=message):
        build(source, ["kernel<1>"], ("-arch=sm_90",))


def test_a_header_of_the_toolkit_is_not_found():
    with pytest.raises(CompileError, match="cuda_fp16.h"):
        build("#include <cuda_fp16.h>\n" + KEEPS_MANY_VALUES, ["kernel<4>"], ("-arch=sm_90",))
