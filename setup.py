"""Say which folders are packages; everything else stands in pyproject.toml.

The run records lie in ``records/`` beside the package, where people look for
them. In a wheel they travel inside it, as ``advbn_lib/_records``, so that an
installation without a checkout (Colab) can show the recorded numbers too.
"""

from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["advbn_lib", "advbn_lib.*"])
package_dir = {}
package_data = {
    "advbn_lib": ["*.json"],  # changes of the code that left the numbers as they were
    "advbn_lib.data": ["*.json", "*.txt"],  # painting histograms, ImageNet's classes
    "advbn_lib.generators": ["*.safetensors"],
}
if Path("records").is_dir():
    packages.append("advbn_lib._records")
    package_dir["advbn_lib._records"] = "records"
    package_data["advbn_lib._records"] = ["*.json", "**/*.json"]

setup(packages=packages, package_dir=package_dir, package_data=package_data, include_package_data=False)
