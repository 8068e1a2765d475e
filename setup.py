"""Install yaongi; if nvcc is found, also build `yaongi/_C.so` for sm_90a with CMake.

YAONGI_CUDA=auto (default) builds if nvcc is found, 0 never builds, 1 fails if it can't build.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
LOG = BUILD / "build.log"
SERIALISED_WGMMA = re.compile(r"C75\d\d")  # ptxas notes, not errors: wgmma was serialised or setmaxnreg ignored


def find_nvcc() -> str | None:
    """Return the path of nvcc, from CUDACXX, CUDA_HOME, PATH, or the usual folder, in this order."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if "CUDA_HOME" in os.environ else None]
    candidates += [shutil.which("nvcc"), f"{home}/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).is_file()), None)


def find_torch() -> Path | None:
    """Return the folder of the torch package without importing it; this also works in pip's isolated build."""
    folder = Path(sysconfig.get_path("platlib")) / "torch"
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def wanted_extensions() -> list[Extension]:
    """Return the `_C` extension if it is to be built; exit with one line if it must be but something is missing."""
    mode = os.environ.get("YAONGI_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"yaongi: YAONGI_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return []
    if find_nvcc() is None:
        if mode == "1":
            sys.exit("yaongi: YAONGI_CUDA=1 but nvcc was not found: install CUDA 13 or set CUDACXX=/path/to/nvcc")
        print("yaongi: nvcc was not found, so the CUDA kernels are not built; Triton and the references remain")
        return []
    if find_torch() is None:
        sys.exit("yaongi: building the CUDA kernels needs torch: `pip install torch` first (or YAONGI_CUDA=0 to skip)")
    if shutil.which("cmake") is None:
        sys.exit("yaongi: building the CUDA kernels needs cmake: `pip install cmake ninja` first (or YAONGI_CUDA=0)")
    return [Extension("yaongi._C", sources=[])]


class CMakeBuild(build_ext):
    """Build of `yaongi/_C.so` in build/cmake, which is kept, so that a rebuild after an edit takes seconds."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI tag: one file serves every Python version

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = BUILD / "cmake"
        folder.mkdir(parents=True, exist_ok=True)
        LOG.write_text("")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defines = ["-DCMAKE_BUILD_TYPE=Release", f"-DYAONGI_TORCH={find_torch()}"]
        defines += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        run_logged(["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *defines])
        run_logged(["cmake", "--build", str(folder), "--parallel"])
        refuse_serialised_wgmma()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / "_C.so", target)


def run_logged(command: list[str]) -> None:
    """Run a command and append its output to build/build.log; exit with the last lines if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}")
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        sys.exit(f"{tail}\nyaongi: building the CUDA kernels failed; the whole log is in {LOG}")


def refuse_serialised_wgmma() -> None:
    """Fail if ptxas serialised a kernel's wgmma, which makes it correct but several times slower.

    ptxas says so only when it compiles, so the objects are deleted too: the next build must compile and report again.
    """
    lines = [line for line in LOG.read_text().splitlines() if SERIALISED_WGMMA.search(line)]
    if lines:
        shutil.rmtree(BUILD / "cmake")
        sys.exit("\n".join(lines[:5]) + "\nyaongi: ptxas serialised wgmma or ignored setmaxnreg (see above)")


REQUIRES = ["torch>=2.10", "triton>=3.6", "numpy", "sentencepiece", "safetensors", "tokenizers"]
REQUIRES += ["tyro", "rich", "matplotlib", "wandb", "filelock"]
EXTRAS = {
    "data": ["datasets", "huggingface_hub", "pyarrow", "rensa", "zstandard"],
    "log": ["tensorboard"],
    "eval": ["lm-eval==0.4.13"],
    "gguf": ["gguf>=0.18"],
    "serve": ["starlette>=1.0", "uvicorn>=0.40"],
    "peers": [
        "mamba-ssm",
        "causal-conv1d",
        "flash-attn",
        "transformer-engine",
        "gram-newton-schulz",
        "liger-kernel",
    ],
    "dev": [
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "transformers>=5.17",
        "psutil",
        "trl",
        "httpx",
        "tenacity",
    ],
}
EXTRAS["all"] = [package for name, packages in EXTRAS.items() if name not in ("peers", "dev") for package in packages]
EXTRAS["dev"] += EXTRAS["all"]

CLASSIFIERS = [
    "Development Status :: 4 - Beta",
    "Environment :: GPU :: NVIDIA CUDA :: 13",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Natural Language :: Korean",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]


def project_urls() -> dict[str, str]:
    """Return links to the clone's `origin` on the web, without credentials; none if `origin` is a path."""
    command = ["git", "-C", str(ROOT), "config", "--get", "remote.origin.url"]
    try:
        origin = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()
    except FileNotFoundError:  # git isn't installed
        return {}
    found = re.fullmatch(r"(?:https://(?:[^@/]*@)?|(?:ssh://)?git@)([\w.-]+)[:/](.+?)(?:\.git)?/?", origin)
    if not found:
        return {}
    home = f"https://{found[1]}/{found[2]}"
    return {"Source": home, "Issues": f"{home}/issues"}


setup(
    name="yaongi",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "yaongi/__init__.py").read_text())[1],  # type: ignore[index]
    description="Kernels and a trainer for Mamba-2 + mixture-of-experts language models on one H100",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=[
        "language model",
        "pretraining",
        "Korean",
        "Mamba-2",
        "mixture of experts",
        "Muon",
        "H100",
        "Triton",
        "CUDA",
    ],
    classifiers=CLASSIFIERS,
    project_urls=project_urls(),
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["yaongi", "yaongi.*"]),
    package_data={
        "yaongi": [
            "_C.so",
            "py.typed",
            "presets/*.toml",
            "presets/*/*.toml",
            "data/sources/embedded/*.txt",
            "data/sources/embedded/*/*.txt",
            "kernels/*/README.md",
            "serve/page.html",
        ]
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["yaongi=yaongi.__main__:main"]},
    ext_modules=wanted_extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
