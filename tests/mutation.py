"""Do the tests fail where the code is wrong? Makes one mistake at a time in a copy of the project and runs its tests.

`python tests/mutation.py` applies each mutation of the table below to a temporary copy, runs the test files that should
notice, and prints which mutations were killed and which survived; exit code 1 if any survived. `--only packing` runs
those that have "packing" in their file, text or tests. The core of the copy is built for every mutation of its sources,
for processors without vectors and for AVX2: an x86 processor and g++ are needed.

A mutation that no test can see, because the results stay the same, does not belong here.
"""

import argparse
import ast
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = "quant/integer/core"
ISAS = ("portable", "avx2")  # the reference of the others in test_core.py, and one with sums of 16 bits
TIMEOUT = 300  # seconds for the tests of a mutation; without any, they take less altogether

NOISE, SCHEDULE, SAMPLER, EPS_SCALING = (
    "tests/sampling/test_noise.py",
    "tests/sampling/test_noise_schedule.py",
    "tests/sampling/test_sampler.py",
    "tests/ddpm_mnist/test_eps_scaling.py",
)
FUNCTIONAL, QUANTIZERS, PACKING = (f"tests/quant/test_{name}.py" for name in ("functional", "quantizers", "packing"))
CORE_TESTS, MODEL = (f"tests/quant/integer/test_{name}.py" for name in ("core", "model"))

# By file: the test files, and words for pytest's -k, of which the mutations follow: what is replaced by what.
TABLE: dict[str, dict[str, list[tuple[str, str]]]] = {
    "ddpm_mnist/sampling/exact.py": {
        NOISE: [("np.where(low, 2 * m, m), n - low", "np.where(low, 2 * m, m), n")],
        SCHEDULE: [("power * (power - 1)", "power * (power + 1)")],
    },
    "ddpm_mnist/sampling/solver.py": {
        EPS_SCALING: [("self.eps_scale * sigma", "sigma / self.eps_scale")],
        SAMPLER: [("h[1:] / (2 * h[:-1])", "h[:-1] / (2 * h[1:])")],
    },
    "quant/functional.py": {FUNCTIONAL: [("steps.round_() if", "steps.floor_() if")]},
    "quant/quantizers.py": {QUANTIZERS: [("rows[below], rows[above], fraction", "below, above, fraction")]},
    "quant/packing.py": {PACKING: [('np.packbits(stream, bitorder="little")', 'np.packbits(stream, bitorder="big")')]},
    f"{CORE}/codes.h": {CORE_TESTS: [("min(max(x * inverse, low), high)", "max(x * inverse, low)")]},
    "quant/integer/model.py": {MODEL: [("zero_points).round().int()", "zero_points).int()")]},
}


@dataclass(frozen=True)
class Mutation:
    """A mistake: in `file`, `right` becomes `wrong`, and `tests` (arguments of pytest) should fail."""

    file: str
    tests: str
    right: str
    wrong: str

    def __str__(self) -> str:
        right, wrong = (" ".join(text.split()) for text in (self.right, self.wrong))
        return f"{self.file}: {right} -> {wrong or 'nothing'}"


MUTATIONS = [
    Mutation(file, tests, right, wrong)
    for file, by_tests in TABLE.items()
    for tests, pairs in by_tests.items()
    for right, wrong in pairs
]


def paths_of(tests: str) -> list[str]:
    """The test files among pytest's arguments."""
    return [word for word in shlex.split(tests) if word.startswith("tests/")]


def check(mutations: list[Mutation]) -> None:
    """Exit with a line for each test file that is missing and each text that is not in its file exactly once."""
    wrong = [f"{path} is missing" for m in mutations for path in paths_of(m.tests) if not (ROOT / path).is_file()]
    for m in mutations:
        count = (ROOT / m.file).read_text().count(m.right) if (ROOT / m.file).is_file() else 0
        if count != 1:
            wrong.append(f"{m}: the text before the arrow occurs {count} times, not once")
    if wrong:
        sys.exit("\n".join(dict.fromkeys(wrong)))


def copy_project(copy: Path) -> None:
    """Copy the files that git knows, as they are now, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # some may have been deleted
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def build_core(copy: Path) -> None:
    """Build the copy's core as its setup.py does, but for `ISAS` only.

    Raises:
        subprocess.CalledProcessError: the core does not compile.
    """
    assignments = [node for node in ast.parse((copy / "setup.py").read_text()).body if isinstance(node, ast.Assign)]
    tables = {node.targets[0].id: node.value for node in assignments if isinstance(node.targets[0], ast.Name)}
    common, flags = ast.literal_eval(tables["COMMON"]), {"portable": [], **ast.literal_eval(tables["X86"])}
    files = sorted((copy / CORE).iterdir())
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for isa in ISAS:
        macros = [f"-DISA_{isa.upper()}", f'-DSOURCES="{sources}"']
        target = copy / CORE / f"../_core_{isa}{suffix}"
        command = ["g++", *common, *flags[isa], *macros, "-shared", "-fPIC", f"{CORE}/core.cpp", "-o", str(target)]
        subprocess.run(command, cwd=copy, check=True)


def environment(copy: Path) -> dict[str, str]:
    """Variables with which Python takes the packages of the copy, and writes nothing elsewhere."""
    own = {"PYTHONPATH": str(copy), "TMPDIR": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "EFFICIENTDM_ISA": ""}


def check_packages(copy: Path) -> None:
    """Exit unless Python takes the packages of the copy rather than those of the installation, and its core."""
    code = (
        "import ddpm_mnist, finetune, quant; from quant.integer.binding import available, built\n"
        "print(*(module.__file__ for module in (ddpm_mnist, finetune, quant)), *built().values(), sep='\\n')\n"
        f"assert set(available()) == {set(ISAS)}, available()"
    )
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=copy, env=environment(copy), stdout=subprocess.PIPE, text=True)
    print(answer.stdout, end="")
    if answer.returncode or not all(path.startswith(f"{copy}/") for path in answer.stdout.split("\n") if path):
        sys.exit("the copy's packages are not those that run, or this processor has no AVX2")


@contextmanager
def mutated(copy: Path, mutation: Mutation) -> Iterator[None]:
    """The copy with a mutation in it, and the core built anew if it is one of its sources."""
    path, libraries = copy / mutation.file, list((copy / CORE).parent.glob("_core_*"))
    before = {file: file.read_bytes() for file in [path, *libraries]}
    path.write_text(path.read_text().replace(mutation.right, mutation.wrong))
    try:
        if mutation.file.startswith(CORE):
            for library in libraries:
                library.unlink()
            build_core(copy)
        yield
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def run_tests(copy: Path, tests: str, timeout: float | None) -> str | None:
    """Run pytest until a test fails: what failed, or None if all passed.

    Raises:
        RuntimeError: pytest ran no tests, or could not even import them; with the end of what it said.
    """
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no"]
    command = [sys.executable, "-m", "pytest", *options, *shlex.split(tests)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A session of its own, so that no process stays behind.
    process = subprocess.Popen(command, cwd=copy, env=environment(copy), start_new_session=True, **pipes)
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"ended after {timeout} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"crashed: {signal.Signals(-process.returncode).name}"
    failures = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if process.returncode != 1 or not failures:
        raise RuntimeError(f"pytest {tests}: exit code {process.returncode}\n{said[-2000:]}")
    return failures[0].split(" - ")[0].rpartition("::")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="run the mutations that contain this text")
    only = parser.parse_args().only
    mutations = [m for m in MUTATIONS if any(only in text for text in (m.file, m.tests, m.right, m.wrong))]
    if not mutations:
        sys.exit(f'no mutation contains "{only}"')
    check(mutations)
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder).resolve() / "project"
        copy_project(copy)
        build_core(copy)
        check_packages(copy)
        whole = dict.fromkeys(path for m in mutations for path in paths_of(m.tests))
        start = time.monotonic()
        if (failure := run_tests(copy, shlex.join(whole), None)) is not None:
            sys.exit(f"without any mutation, {failure} fails")
        print(f"{len(whole)} test files pass without a mutation, in {time.monotonic() - start:.0f} s")
        for m in mutations:
            start = time.monotonic()
            with mutated(copy, m):
                failure = run_tests(copy, m.tests, TIMEOUT)
            survived += failure is None
            state = "SURVIVED" if failure is None else "killed  "
            print(f"{state} {time.monotonic() - start:4.0f} s  {m}  [{failure or m.tests}]", flush=True)
    print(f"{len(mutations) - survived} killed, {survived} survived")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
