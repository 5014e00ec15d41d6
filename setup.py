"""Only for the optional compiled kernels: everything else about the package is in setup.cfg.

Without a compiler, or where it fails, the package installs without them and runs integers through torch.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

FOLDER = "quantkit/runtime/int_linear"
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"]
OPENMP = "-fopenmp"


class BuildKernels(build_ext):
    """Builds with OpenMP where the compiler has it, on one thread where it has not."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            print(f"building {ext.name} with {OPENMP} failed ({error}); trying without")
            ext.extra_compile_args = FLAGS
            ext.extra_link_args = []
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "quantkit.runtime.int_linear._compiled",
            sources=[f"{FOLDER}/{name}.cpp" for name in ("interface", "avx2", "vnni")],
            depends=[f"{FOLDER}/{name}.h" for name in ("job", "driver")],
            extra_compile_args=[*FLAGS, OPENMP],
            extra_link_args=[OPENMP],
            language="c++",
            optional=True,
        )
    ],
)
