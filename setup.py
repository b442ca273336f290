"""Build the extension ttun._codec; everything else about the package is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["csrc/build_codec.py:ffibuilder"],
    # cffi compiles against the stable ABI, so one wheel serves every Python from 3.9 on.
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
)
