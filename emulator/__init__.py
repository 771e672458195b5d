"""A GPU emulator for verification: runs compiled PTX on a CPU. Nothing is here yet.
"""

if __name__ == "hotloop.emulator":
    __all__: list[str] = []
else:
    # The repository root is on sys.path, so that this folder answers to the bare name `emulator`, which `transformers` and
    # others probe for as a package of that name. Raising here would break their import; importing anything would
    # register every operator twice.
    __version__ = "0"

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"{name!r} was looked up in the folder {__file__!r} imported as {__name__!r}; "
            "this package is imported as hotloop.emulator (run `pip install -e .` and start Python outside the repository "
            "root, or with -P)"
        )
