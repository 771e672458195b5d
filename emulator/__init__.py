"""A GPU emulator for verification: runs compiled PTX on a CPU. Nothing is here yet."""

if __name__ == "hotloop.emulator":
    __all__: list[str] = []
else:
    # The repository root is on sys.path, so that this folder answers to the bare name `emulator`. `transformers` probes
    # for packages by such names: raising here would break its import, and importing would register operators twice.
    __version__ = "0"

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"{name!r} was looked up in {__file__!r}, imported as {__name__!r}: "
            "this package is imported as hotloop.emulator (run `pip install -e .`, and start Python outside "
            "the repository's root or with -P)"
        )
