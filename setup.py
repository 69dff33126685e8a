import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "opacus_pi" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"', INIT, re.MULTILINE).group(1)
DOCS = [
    "mkdocs>=1.6",
    "mkdocs-material>=9.5",
    "mkdocstrings[python]>=0.30",
    "pymdown-extensions>=10",
]

setup(
    name="opacus-pi",
    version=VERSION,
    description="What each training example costs in privacy, and what it takes to "
    "forget it: per-instance Renyi accounting and unlearning on Opacus.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # with one source folder an editable install is a plain path, which mypy follows
    package_dir={"": "."},
    packages=find_packages(include=["opacus_pi", "opacus_pi.*"]),
    package_data={"opacus_pi": ["py.typed", "report/templates/*"]},
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "opacus>=1.6,<1.7",
        "numpy>=1.26",
        "scipy>=1.11.1",
        "matplotlib>=3.9",
        "scikit-learn>=1.4",
        "tqdm>=4.65",
        "jinja2>=3.1",
        "safetensors>=0.5",
        "typing-extensions>=4.10",
    ],
    extras_require={
        "benchmarks": ["joblib>=1.4", "optuna>=4"],
        "docs": DOCS,
        "frames": ["pandas>=2"],
        "lightning": ["lightning>=2.6"],
        "search": ["optuna>=4"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mpmath>=1.3",
            "ruff>=0.9",
            "mypy>=2",
            "build>=1.2",
            *DOCS,
            "dask[distributed]>=2024.1",
            "optuna>=4",
            "pandas>=2",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "lightning>=2.6",
            "accelerate>=1",
            "peft>=0.18",
            "transformers>=5",
            "datasets>=3",
        ],
    },
    entry_points={"console_scripts": ["opacus-pi=opacus_pi.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Security",
    ],
)
