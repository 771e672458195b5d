"""The engine: documents in, trained model out. See `hotloop --help`.

`load_pretrained(folder)` and `save_pretrained(model, folder)` take checkpoints of `transformers` in and out: GPT-2,
Llama, Qwen2, Qwen3, BERT, ModernBERT.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotloop.engine.pretrained import load_pretrained, save_pretrained

if __name__ == "hotloop.engine":
    __all__ = ["load_pretrained", "save_pretrained"]

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from hotloop.engine import pretrained  # torch comes with it

        return getattr(pretrained, name)
else:
    # The repository root is on sys.path, so that this folder answers to the bare name `engine`. `transformers` probes
    # for packages by such names: raising here would break its import, and importing would register operators twice.
    __version__ = "0"

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"{name!r} was looked up in {__file__!r}, imported as {__name__!r}: "
            "this package is imported as hotloop.engine (run `pip install -e .`, and start Python outside "
            "the repository's root or with -P)"
        )
