"""The parser that all commands start from."""

import argparse


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of the module that is run.

    Args:
        module: Name that follows ``python -m``.
        doc: The docstring.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
